"""Public names and their signatures: what a user's script may rely on. A change here is told in CHANGELOG.md."""

import inspect

import hf_tract
import hf_tract.integrations
import hf_tract.metrics

PUBLIC = {
    "FirstLayer": "(name, module, source)",
    "Spectrum": "(mean, largest, condition, above, n)",
    "TrActCallback": "(lam=0.1, layers='auto', scope='global', *, whiten_init=False)",
    "TrActCallback.handle_of": "(self, model)",
    "TrActCallback.hyperparameters": "property",
    "TrActConfig": "(lam=0.1, layers='auto', scope='global')",
    "TrActConfig.to_dict": "(self)",
    "TrActConfig.from_dict": "(values)",
    "TrActConfig.to_json_file": "(self, path)",
    "TrActConfig.from_json_file": "(path)",
    "TrActError": "ValueError",
    "TrActHandle": "(model, layers, config)",
    "TrActHandle.model": "property",
    "TrActHandle.remove": "(self)",
    "TrActHandle.no_sync": "(self)",
    "TrActHandle.stats": "(self)",
    "TrActHandle.summary": "(self)",
    "TrActHook": "(lam=0.1, layers='auto', scope='global', *, example_batch=None, process_group=None)",
    "TrActHook.init_hook": "(self, module)",
    "TrActHook.detach_hook": "(self, module)",
    "TrActTrainerCallback": "(lam=0.1, layers='auto', scope='global', *, whiten_init=False)",
    "TrActTrainerCallback.handle_of": "(self, model)",
    "TrActTrainerCallback.hyperparameters": "property",
    "apply_tract": "(model, lam=0.1, layers='auto', scope='global', *, example_batch=None, process_group=None)",
    "find_first_layers": "(model, layers='auto', example_batch=None)",
    "first_layer_spectrum": "(model, batches, lam=0.1, layers='auto')",
    "remove_tract": "(model)",
    "whiten_first_layer": (
        "(model, batches, lam=0.1, layers='auto', *, match_scale=True, force=False, process_group=None)"
    ),
}
SHARED = ("TrActCallback", "TrActHook", "TrActTrainerCallback")
INTEGRATIONS = {
    **{name: value for name, value in PUBLIC.items() if name.startswith(SHARED)},
    "TrainingRecord": (
        "(name, library, dataset, tract=None, layers=(), base_model=None, license=None, metrics=<factory>, "
        "history=(), hyperparameters=<factory>, split='test', seed=0, command=<factory>, hardware=<factory>, "
        "versions=<factory>, task='image-classification')"
    ),
    "TrainingRecord.from_trainer": "(trainer, *, dataset=None, base_model=None, license=None, split='evaluation')",
    "TrainingRecord.from_json_file": "(path)",
    "TrainingRecord.to_json_file": "(self, path)",
    "TrainingRecord.save": "(self, folder, model_id=None, tags=())",
    "stats_to_log": "(handle)",
    "use_model_card": "(trainer, *, dataset, license=None, base_model=None, split='evaluation')",
}


def signatures(package) -> dict[str, str]:
    """Each public name with its arguments and defaults, and those of its public methods."""
    found = {}
    for name in package.__all__:
        value = getattr(package, name)
        found[name] = arguments(value)
        if inspect.isclass(value):
            for method, member in vars(value).items():
                if not method.startswith(("_", "on_")) and (
                    inspect.isroutine(member) or isinstance(member, (classmethod, property))
                ):
                    found[f"{name}.{method}"] = (
                        "property" if isinstance(member, property) else arguments(getattr(value, method))
                    )
    return found


def arguments(value) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return value.__base__.__name__
    signature = inspect.signature(value)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_public_names_have_these_signatures():
    assert signatures(hf_tract) == PUBLIC


def test_public_names_of_the_integrations_have_these_signatures():
    assert signatures(hf_tract.integrations) == INTEGRATIONS


def test_the_metrics_have_these_signatures():
    assert arguments(hf_tract.metrics.compute_top_k) == "(prediction)"
    predictions, references = [[0.1, 0.9]], [1]
    assert hf_tract.metrics.TopK().compute(predictions=predictions, references=references) == {
        "top1": 1.0,
        "top5": 1.0,
    }
