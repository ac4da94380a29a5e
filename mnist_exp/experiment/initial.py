"""Initial weights from a trained model or a file: `init=MODEL`."""

from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.learning.data import Dataset
from mnist_exp.settings import DataDescription, Settings
from mnist_exp.tracking.base import Store
from mnist_exp.tracking.models import digest_of, read_initial


def load_initial(model: nn.Module, settings: Settings, store: Store) -> list[DataDescription]:
    """Load the weights of `settings.init` into a model, in place.

    Return the description of the data that they come from, nothing for a file, which does not say.

    With `init_strict=false`, only the weights whose name and shape fit are loaded.

    Raises:
        UserError: There is no such model, it has changed, or its weights do not fit.
    """
    assert settings.init
    name, _, digest = settings.init.rpartition(":")
    _, weights, before = read_initial(store, name, settings.output_dir)
    if digest_of(weights) != digest:
        raise UserError.invalid("init", settings.init, f"the weights that it had, not those of {digest_of(weights)}")
    present = model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in present and present[key].shape == value.shape}
    if not fitting or (settings.init_strict and not weights.keys() == present.keys() == fitting.keys()):
        remedy = "Take the weights that fit with init_strict=false." if fitting else "Choose another model."
        others = ", ".join(sorted((weights.keys() | present.keys()) - fitting.keys())[:4])
        fits = f"a model with the same weights: {len(fitting)} of its {len(weights)} fit the {len(present)} here, not {others}"
        raise UserError.invalid("init", name, fits, remedy)
    model.load_state_dict(present | fitting)
    return before


def splits_used_before(own: DataDescription, data: Dataset, init: str | None) -> list[str]:
    """Return the splits of the data that the models before a run may have been trained on.

    Args:
        own: The description of the data, with the models before.
        data: The data set.
        init: The model whose weights the run starts from, for the message.

    Raises:
        UserError: Among them is the split that scores the run.
    """
    used = [split for split in data.splits if any(earlier.may_have_trained_on(own, split) for earlier in own.before)]
    if data.eval_split in used:
        expected = f"a model that was not trained on the {data.eval_split} split of this data, and that one may have been"
        raise UserError.invalid("init", init, expected, "Choose a model of the same data, or of other data.")
    return used
