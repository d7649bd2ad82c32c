import inspect
import itertools
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lrf_lightning import LowRankCompression, RankMonitor

RECIPES = {
    "digits": "digits.Digits",
    "digits_small": "digits.Digits",
    "fashion_resnext": "fashion.FashionMNIST",
    "fashion_resnext50": "fashion.FashionMNIST",
    "fashion_vit": "fashion.FashionMNIST",
}
# need packages of their own; see tests/recipes/test_text_recipes.py
TEXT = {"r8_transformer", "minilm_r8", "lm_shakespeare", "smollm2", "finetuned"}
SWEEPS = ["budgets", "grid", "optuna", "parallel", "cluster"]
OPTIONS = ["lossless", "compact", "budget", "frontier", "paper"]


@pytest.fixture
def composed(project):
    """Compose conf/train.yaml as Hydra does for a job."""

    def build(*overrides: str) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(project / "conf")):
            cfg = compose("train.yaml", ["hydra.runtime.output_dir=outputs", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    yield build
    HydraConfig.instance().cfg = None


def application(cfg: DictConfig) -> dict:
    """The resolved config without Hydra's own part."""
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"]), resolve=True)


def targets(node) -> list[str]:
    if isinstance(node, dict):
        return [
            *([node["_target_"]] if "_target_" in node else []),
            *(t for value in node.values() for t in targets(value)),
        ]
    return [t for value in node for t in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize(("recipe", "option"), list(itertools.product(RECIPES, [None, *OPTIONS])))
def test_every_recipe_with_every_option(composed, recipe, option):
    cfg = application(composed(f"recipe={recipe}", *([f"+compress={option}"] if option else [])))
    assert cfg["task_name"] == recipe
    assert ("compress" in cfg["callbacks"]) == (option is not None)
    assert "compress" not in cfg
    found = targets(cfg)
    assert {"lightning.Trainer", f"recipes.{RECIPES[recipe]}"} <= set(found)
    for target in found:
        assert callable(get_object(target))


def test_every_command_of_the_readme_composes(composed, project):
    commands = [
        shlex.split(command, comments=True)
        for block in re.findall(r"```bash\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
        for command in block.replace("\\\n", " ").splitlines()
    ]
    overrides = [words[words.index("train.py") + 1 :] for words in commands if "train.py" in words]
    assert len(overrides) > 8
    for words in overrides:
        found = [word for word in words if not word.startswith("-") and word != "searchpath"]
        # a sweep has several values, of which a job gets one
        composed(*(re.sub(r",.*", "", word) if "-m" in words else word for word in found))


def test_lists_are_complete(project):
    """What the tests above run over is everything there is."""
    folder = project / "lrf_lightning" / "conf" / "compress"
    assert {path.stem for path in folder.glob("*.yaml")} == set(OPTIONS)
    assert {path.stem for path in (project / "conf" / "recipe").glob("*.yaml")} == set(RECIPES) | TEXT
    assert {path.stem for path in (project / "conf" / "sweep").glob("*.yaml")} == set(SWEEPS)


def test_yaml_equals_the_signature(composed):
    node = application(composed("+compress=lossless"))["callbacks"]["compress"]
    assert node.pop("_target_") == "lrf_lightning.LowRankCompression"
    assert node.pop("_convert_") == "all"
    margin = application(composed())["compress_margins"]["score"]
    assert node["score_margin"] == margin, "the recipe's own margin is taken"
    parameters = inspect.signature(LowRankCompression.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert node | {"score_margin": expected["score_margin"]} == expected


def test_margins_are_the_callbacks_where_an_app_states_none(composed):
    node = application(composed("+compress=lossless", "~compress_margins"))["callbacks"]["compress"]
    parameters = inspect.signature(LowRankCompression.__init__).parameters
    for name in ("loss_margin", "score_margin"):
        assert node[name] == parameters[name].default


@pytest.mark.parametrize("option", OPTIONS)
def test_options_differ_in_the_objective_only(composed, option):
    lossless = application(composed("+compress=lossless"))["callbacks"]["compress"]
    assert application(composed(f"+compress={option}"))["callbacks"]["compress"] == lossless | {"objective": option}


@pytest.mark.parametrize("path", ["compress/lossless.yaml", "callbacks/rank_monitor/default.yaml"])
def test_every_argument_has_a_comment(project, path):
    lines = (project / "lrf_lightning" / "conf" / path).read_text().splitlines()
    bare = [line for line in lines if re.match(r"\w+:", line) and not line.startswith("_target_") and " # " not in line]
    assert bare == []


def test_overrides_reach_the_callback(composed):
    cfg = composed("+compress=budget", "callbacks.compress.keep=0.25", "callbacks.compress.exclude=[net.0]")
    assert cfg.callbacks.compress.keep == 0.25
    with pytest.raises(HydraException, match="kep"):
        composed("+compress=budget", "callbacks.compress.kep=0.25")


def test_unknown_option_is_an_error(composed):
    with pytest.raises(HydraException, match="compress/losless"):
        composed("+compress=losless")


@pytest.mark.parametrize(
    ("override", "names"),
    [("logger=none", []), ("logger=csv", ["csv"]), ("logger=wandb", ["wandb"]), ("logger=default", ["csv", "wandb"])],
)
def test_loggers(composed, override, names):
    assert list(application(composed(override)).get("logger") or {}) == names


def test_recipe_overrides_the_trainer_and_the_command_line_the_recipe(composed):
    assert composed("~recipe").trainer.max_epochs != composed().trainer.max_epochs
    assert composed("trainer.max_epochs=3").trainer.max_epochs == 3


def test_only_our_own_callbacks_are_added_to_other_apps(project):
    options = project / "lrf_lightning" / "conf"
    assert {path.name for path in options.iterdir() if path.suffix != ".py"} - {"__pycache__"} == {
        "callbacks",
        "compress",
    }
    assert [path.name for path in (options / "callbacks").iterdir()] == ["rank_monitor"]


def test_the_rank_monitor_is_a_callback_beside_the_others(composed):
    cfg = composed("+callbacks/rank_monitor=default", "+compress=compact", "callbacks.rank_monitor.every_n_epochs=5")
    callbacks = application(cfg)["callbacks"]
    assert set(callbacks) == {"checkpoint", "compress", "rank_monitor"}
    node = callbacks["rank_monitor"]
    assert get_object(node.pop("_target_")) is RankMonitor
    assert node.pop("_convert_") == "all"
    parameters = inspect.signature(RankMonitor.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert node == expected | {"every_n_epochs": 5}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_compress_to_budgets_and_their_parameters_exist(composed, sweep):
    cfg = composed(f"+sweep={sweep}")
    assert cfg.callbacks.compress.objective == "budget"
    assert callable(get_object(cfg.hydra.sweeper._target_))
    assert callable(get_object(cfg.hydra.launcher._target_))
    for name in cfg.hydra.sweeper.params:
        group = name == "recipe"
        assert group or OmegaConf.select(cfg, name, default="missing") != "missing", name


def test_the_search_has_two_objectives_that_the_verdict_takes_no_part_in(composed):
    cfg = composed("+sweep=optuna")
    assert cfg.optimized_metric == ["compress/selection_score", "compress/params_model_after"]
    assert cfg.hydra.sweeper.direction == ["maximize", "minimize"]


def test_parallel_jobs(composed):
    launcher = composed("+sweep=parallel").hydra.launcher
    assert launcher._target_.endswith("JoblibLauncher")
    assert launcher.n_jobs == 2


def test_jobs_of_a_cluster(composed):
    launcher = composed("+sweep=cluster").hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node) == (1, 1)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_readme_has_the_command_of_every_sweep(project, sweep):
    assert f"+sweep={sweep}" in (project / "README.md").read_text()
