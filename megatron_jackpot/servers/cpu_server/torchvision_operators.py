"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch.

Its C++ operators do not load there, and its import dies on registering a fake for torchvision::nms. The two
schemas are declared just before that; serving text never calls them. Python imports this module at start-up
because its folder is on the server's PYTHONPATH.
"""

import importlib.abc
import sys


class TorchvisionOperators(importlib.abc.MetaPathFinder):
    """Declares the missing operators when torchvision is about to look for them; finds no module itself."""

    library: object = None

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision._meta_registrations" and self.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                self.library = library  # its operators go with it


sys.meta_path.insert(0, TorchvisionOperators())
