"""Every recipe is composed with every objective; what they do is tested beside their modules."""

import inspect

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import train as application
from recipes.finetuned import load_module

RECIPES = ["r8_transformer", "minilm_r8", "lm_shakespeare", "smollm2"]
OBJECTIVES = ["lossless", "compact", "budget", "frontier", "paper"]
OWN = ["ckpt_path=x.ckpt", "module=my.Module", "datamodule=my.Data"]


def targets(node, path=""):
    """All nodes that are instantiated, with their paths."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for name, value in node.items():
            yield from targets(value, f"{path}.{name}".lstrip("."))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recipe", [*RECIPES, "finetuned"])
def test_recipe_and_objective(composed, recipe, objective):
    cfg = composed(f"recipe={recipe}", f"+compress={objective}", *(OWN if recipe == "finetuned" else []))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert cfg.task_name == recipe
    assert cfg.callbacks.compress.objective == objective
    for path, node in [*targets(cfg.data, "data"), *targets(cfg.model, "model")]:
        parameters = inspect.signature(get_object(node._target_)).parameters
        given = set(node) - {"_target_", "_convert_"}
        assert given <= set(parameters), path


@pytest.mark.parametrize("recipe", RECIPES)
def test_yaml_lists_every_argument_but_trained_weights_of_others(composed, recipe):
    cfg = composed(f"recipe={recipe}")
    for path, node in [*targets(cfg.data, "data"), *targets(cfg.model, "model")]:
        assert set(inspect.signature(get_object(node._target_)).parameters) <= set(node), path


@pytest.mark.parametrize("recipe", ["smollm2", "finetuned"])
def test_nothing_is_trained(composed, recipe):
    cfg = composed(f"recipe={recipe}", *(OWN if recipe == "finetuned" else []))
    assert (cfg.train, cfg.pretrained) == (False, True)


def test_what_finetuned_misses_is_named(composed):
    with pytest.raises(ValueError, match=r"datamodule=VALUE module=VALUE is missing; .*recipe/finetuned.yaml"):
        application.train(composed("recipe=finetuned"))
    with pytest.raises(ValueError, match="add ckpt_path=FILE"):
        load_module("lightning.LightningModule", None)
