"""Does Transformer Engine's library run here at all? One linear layer per recipe against torch in bf16.

    python tests/gpu/te_smoke.py

The bundle's library was cut down to one architecture, so this comes before everything else.
"""

import torch
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

RECIPES = {
    "bf16": None,
    "delayed": recipe.DelayedScaling(),
    "tensorwise": recipe.Float8CurrentScaling(),
    "blockwise": recipe.Float8BlockScaling(),
}
LARGEST_ERROR = {"bf16": 0.01, "delayed": 0.1, "tensorwise": 0.1, "blockwise": 0.1}
"""||out - reference|| / ||reference||, of the output and of the input's gradient."""


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, te.__name__)
    failed = []
    for name, chosen in RECIPES.items():
        layer = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16).cuda()
        given = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        # Delayed scaling knows its scales only from the second step on.
        for _ in range(3):
            given.grad = None
            with te.fp8_autocast(enabled=chosen is not None, fp8_recipe=chosen):
                out = layer(given)
            out.sum().backward()
        reference = given.detach().float() @ layer.weight.detach().float().T
        gradient = layer.weight.detach().float().sum(0).expand(256, -1)
        errors = [
            ((mine.float() - wanted).norm() / wanted.norm()).item()
            for mine, wanted in ((out.detach(), reference), (given.grad, gradient))
        ]
        fine = max(errors) <= LARGEST_ERROR[name]
        print(f"{name:12} output {errors[0]:.2e} gradient {errors[1]:.2e} {'ok' if fine else 'TOO LARGE'}")
        failed += [] if fine else [name]
    if failed:
        raise SystemExit(f"too far from the reference: {failed}")


if __name__ == "__main__":
    main()
