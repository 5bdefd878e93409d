"""limbeck distils one language model into another, and keeps the evidence.

A teacher's outputs become training data, a smaller or newer student learns from them, and a ledger records for every
stage what it read, what it wrote and with which settings.

    import limbeck

    result = limbeck.run("recipes/quickstart.yaml", "runs/quickstart")
    result.student      # a model directory for AutoModelForCausalLM.from_pretrained
    result.scores       # what the student kept, with intervals

The way of the data is the map of the package; `limbeck.run` (the module) holds it on one page:

    recipe      Recipe: everything a user may configure
    collect     prompts and the teacher's answers, journaled before anyone parses them
    curate      which answers are kept, and why the others were dropped
    render      chat template to tokens and loss mask
    signal      what the teacher says about every supervised position
    student     how a student begins
    train       losses, the fused loss, rollouts, the trainer
    evaluate    scores with intervals
    export      the model card
    report      what a person reads
    terms       what a teacher's terms say, and the gate's rulings
    ledger      what every stage read and wrote; verification
    models      where weights come from, always with a digest
    generate    answers from a causal language model, in batches
    records     the types that flow between the stages
    errors      every error raised on purpose, in one tree
"""

from importlib import import_module
from typing import TYPE_CHECKING

from limbeck.run import Run, run

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

    __version__: str

__all__ = ["Recipe", "Run", "__version__", "run"]

_ROOMS = (
    *("collect", "curate", "errors", "evaluate", "export", "generate", "ledger", "models", "recipe", "records"),
    *("render", "report", "signal", "student", "terms", "train"),
)


def __getattr__(name: str) -> object:
    """Rooms are imported when they are first used: `import limbeck` needs no torch, `limbeck --help` no pydantic."""
    if name == "Recipe":
        return import_module("limbeck.recipe").Recipe
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("limbeck")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _ROOMS:
        return import_module(f"limbeck.{name}")
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
