"""The config refuses what it does not know, says what to do about it, and documents every setting."""

import pytest
import yaml

from megatron_jackpot import cli
from megatron_jackpot.config import Config, describe, load_config, parse_config
from megatron_jackpot.config.load import RENAMED
from megatron_jackpot.config.yaml_tree import apply_override, read_tree
from megatron_jackpot.launch.arguments import parse


def tree(**sections: dict) -> dict:
    """The smallest valid config, with sections merged in."""
    base = {
        "run": {"folder": "runs/a"},
        "policy": {"hf": "models/policy"},
        "actor": {"hf": "models/actor"},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 64},
        "packing": {"tokens": 256},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return base


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    return path


def test_unknown_key_names_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'rollout.top_k_logps'. Did you mean 'rollout.top_k_logp'\?"):
        parse_config(tree(rollout={"top_k_logps": 5}))


def test_a_key_of_an_earlier_version_names_its_new_one(tmp_path):
    known = {key for key, _, _ in describe()}
    for old, new in RENAMED.items():
        assert new in known and old not in known
        tree_of_then = tree()
        apply_override(tree_of_then, f"{old}=1")
        with pytest.raises(ValueError, match=f"Unknown config key '{old}'. It is '{new}' now"):
            parse_config(tree_of_then)


def test_unknown_section_names_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'rollouts'. Did you mean 'rollout'\?"):
        parse_config(tree(rollouts={}))


def test_unknown_key_two_levels_down_is_named_in_full():
    with pytest.raises(ValueError, match=r"'actor.optimizer.learn_rate'"):
        parse_config(tree(actor={"optimizer": {"learn_rate": 1e-3}}))


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ValueError) as caught:
        parse_config(tree(run={"steps": 0}, parallel={"tp": "two"}))
    lines = str(caught.value).splitlines()
    assert any(line.startswith("run.steps = 0") for line in lines)
    assert any(line.startswith("parallel.tp = 'two'") for line in lines)


def test_overrides_are_yaml_and_the_last_one_wins(config_file):
    config = load_config(
        config_file,
        [
            "run.steps=3",
            "run.steps=4",
            "policy.optimizer.lr=0.01",
            "servers.urls=[http://127.0.0.1:1, http://127.0.0.1:2]",
            "parallel.vpp=null",
            "algorithm.correction.name=tis",
            "algorithm.correction.cap=3.0",
        ],
    )
    assert config.run.steps == 4
    assert config.policy.optimizer.lr == 0.01
    assert config.servers.urls == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert config.algorithm.correction.name == "tis" and config.algorithm.correction.settings == {"cap": 3.0}


@pytest.mark.parametrize(
    ("rollout", "algorithm", "k"),
    [({}, {}, 20), ({"top_k_logp": 5}, {}, 5), ({"top_k_logp": 5}, {"num_candidates": 9}, 9)]
    + [({"top_k_logp": 0}, {}, 20)],
)
def test_the_policys_candidates_are_as_many_as_the_servers_unless_they_are_set(rollout, algorithm, k):
    assert parse_config(tree(rollout=rollout, algorithm=algorithm)).num_candidates == k


@pytest.mark.parametrize("override", ["run.steps", "=3", "run.folder.name=a", "run.steps=[1"])
def test_malformed_override_is_quoted_in_the_message(config_file, override):
    with pytest.raises(ValueError, match="Override") as caught:
        load_config(config_file, [override])
    assert override in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"cp": 2}}, "Set parallel.cp=1"),
        (
            {"evaluation": {"max_new_tokens": 257}, "packing": {"tokens": 16384}},
            "at most 256 tokens. Lower it, or set evaluation.policy=off",
        ),
        ({"evaluation": {"temperature": 0.6}}, "Set evaluation.temperature=0 and samples=1, or"),
        ({"evaluation": {"samples": 2, "policy": "off"}}, "Set evaluation.temperature=1"),
        ({"evaluation": {"sets": {"a/b": {"path": "x"}}}}, "evaluation.sets has 'a/b'"),
        (
            {"sync": {"method": "ipc"}, "servers": {"urls": ["http://10.0.0.7:1"]}},
            "has http://10.0.0.7:1. Set sync",
        ),
        (
            {"sync": {"method": "ipc"}, "cluster": {"nodes": 2}},
            "cluster.nodes = 2. Set sync.method=broadcast",
        ),
        (
            {"servers": {"quantization": "fp8"}, "precision": {"dtype": "float32"}},
            "needs servers.dtype='bfloat16' for what is not quantised, got 'float32'",
        ),
        (
            {"parallel": {"offload_optimizer": True}, "precision": {"dtype": "float32"}},
            "offload_optimizer = true needs precision.dtype='bfloat16'",
        ),
        *(
            ({"servers": {"urls": ["http://n1:3", url]}}, r"servers.urls has .*: must be http://HOST:PORT")
            for url in ("127.0.0.1:3", "n1", "http://::1:3", "http://n1:99999", "ftp://n1:3", "http://n1:3/")
        ),
        ({"rollout": {"ahead": 2}}, "Set rollout.max_staleness=2, or lower ahead"),
        (
            {"sync": {"in_flight": "in_place"}},
            "sync.in_flight = 'in_place': .*no version says what its tokens were drawn from. Set sync",
        ),
        (
            {"rollout": {"ahead": 1}, "servers": {"release_memory": True}},
            "rollout.ahead = 1 has servers sample while the trainer learns",
        ),
        (
            {"rollout": {"top_k_logp": 0}, "servers": {"quantization": "fp8"}},
            "rollout.top_k_logp = 0 takes q from the trainer's scores, but servers compute with other "
            "numbers: servers.quantization = 'fp8'. Set servers.quantization=null, or",
        ),
        (
            {
                "rollout": {"top_k_logp": 0},
                "servers": {"dtype": "bfloat16"},
                "precision": {"dtype": "float32"},
            },
            "numbers: servers.dtype = 'bfloat16'. Set servers.dtype=null, or",
        ),
        ({"parallel": {"vpp": 2}}, "needs parallel.pp > 1"),
        (
            {"actor": {"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}},
            r"actor.optimizer.min_lr = 1e-05.* above actor.optimizer.lr = 1e-06",
        ),
        ({"parallel": {"sequence_parallel": True}}, "needs parallel.tp > 1"),
        (
            {"parallel": {"overlap_param_gather": True, "distributed_optimizer": False}},
            "distributed_optimizer=true",
        ),
        (
            {"precision": {"first_last_layers_bf16": True, "fp8_recipe": "delayed"}},
            "Use 'tensorwise' or 'blockwise'",
        ),
        ({"packing": {"tokens": 127}}, r"packing.tokens = 127 .* = 128.* Raise packing.tokens"),
        *(
            ({"packing": {"tokens": wrong}}, f"packing.tokens = {wrong!r}: must be a number >= 16, or auto")
            for wrong in (15, True, "all", 64.5, None)
        ),
        (
            {"packing": {"tokens": "auto"}, "servers": {"release_memory": True}},
            "packing.tokens = auto .* servers.release_memory = true. Set packing.tokens to a number",
        ),
        ({"algorithm": {"num_minibatches": 3}}, r"does not divide rollout.prompts_per_step = 8"),
        ({"run": {"keep_best": "reward/mean"}}, "Set run.save_every"),
        (
            {"run": {"keep_best": "eval/policy_accuracy", "save_every": 4, "steps": 19}},
            "meet at step 20 first, of 19. Set run.save_every=10",
        ),
        ({"data": {"source": "jsonl"}}, "Set data.path=FILE"),
        ({"data": {"tasks": {}}}, "needs data.tasks"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_with_the_remedy(sections, message):
    with pytest.raises(ValueError, match=message):
        parse_config(tree(**sections))


MERGED = "defaults: {b: &b {x: 1, y: 2}, nested: &a {<<: *b, x: 3}}\ntop: {<<: *a}\nagain: {<<: *a, y: 4}\n"


def test_a_key_of_a_merged_mapping_may_be_given_anew_and_in_one_mapping_stands_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MERGED)
    assert read_tree(path) == yaml.safe_load(MERGED)
    for broken in (MERGED.replace("y: 2", "y: 2, x: 5"), MERGED.replace("y: 4", "y: 4, y: 5")):
        path.write_text(broken)
        with pytest.raises(ValueError, match="stands here a second time"):
            read_tree(path)
    with pytest.raises(ValueError, match="'cap' stands here a second time"):
        apply_override({}, "algorithm.correction={name: tis, cap: 2, cap: 3}")


def test_missing_required_key_says_how_to_set_it():
    incomplete = tree()
    del incomplete["policy"]["hf"]
    with pytest.raises(ValueError, match=r"'policy.hf' is missing.*policy.hf=VALUE"):
        parse_config(incomplete)


def test_resolved_config_reads_back_as_itself(tmp_path):
    config = parse_config(
        tree(algorithm={"correction": {"name": "jackpot", "lam": 1.2}}, servers={"urls": ["http://a:1"]})
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(tree()).run.steps = 7


def test_every_setting_has_a_meaning_except_the_name_of_a_section():
    assert [key for key, _, meaning in describe() if not meaning] == []


@pytest.mark.parametrize("command", ["train", "launch"])
def test_help_lists_every_setting_with_its_meaning(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, default, meaning in describe(Config):
        assert f"{key} = {' '.join(default.split())}" in shown
        assert " ".join(meaning.split()) in shown


@pytest.mark.parametrize("command", ["train", "launch"])
def test_a_mistake_in_the_config_ends_with_code_2_and_no_traceback(command, config_file, capsys):
    assert cli.main([command, str(config_file), "run.stepz=3"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("megatron-jackpot: ") and "Did you mean 'run.steps'?" in err and "Traceback" not in err
    )


def test_a_missing_file_ends_with_code_2(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option():
    args = parse(["launch", "run.yaml", "a=1", "--nproc", "2", "b=2"], str)
    assert (args.overrides, args.nproc) == (["a=1", "b=2"], 2)


def test_words_that_are_neither_option_nor_override_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["launch", "run.yaml", "--nprocs", "2"], str)
    assert ended.value.code == 2
    assert "--nprocs" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["false", "7", "[a.yaml]", "{a: b}"])
def test_a_base_that_is_no_path_is_named(tmp_path, base):
    (tmp_path / "run.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ValueError, match="base = .* must be the path of a YAML file"):
        load_config(tmp_path / "run.yaml", [])


def test_a_base_file_counts_where_the_file_itself_has_no_key(tmp_path):
    tree = {
        "run": {"folder": "a", "steps": 5},
        "policy": {"hf": "p"},
        "actor": {"hf": "a"},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 64},
        "algorithm": {"correction": {"name": "jackpot", "lam": 2.0}},
    }
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text(yaml.safe_dump(tree))
    more = {"base": "below/base.yaml", "run": {"steps": 7}, "algorithm": {"correction": {"name": "tis"}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(more))
    config = load_config(tmp_path / "run.yaml", ["run.seed=3"])
    assert (str(config.run.folder), config.run.steps, config.run.seed) == ("a", 7, 3)
    assert config.algorithm.correction.name == "tis" and config.algorithm.correction.settings == {}
    (tmp_path / "below" / "base.yaml").write_text("base: ../run.yaml")
    with pytest.raises(ValueError, match="form a circle"):
        load_config(tmp_path / "run.yaml")
