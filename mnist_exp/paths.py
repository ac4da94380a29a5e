"""Where things are: the configuration, and the locations of runs, data and the store that the user typed."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

NAME = "mnist_exp"  # of the package and the experiment
DISTRIBUTION = NAME.replace("_", "-")  # as pip knows it
PACKAGE = Path(__file__).resolve().parent
# The repository that this package is used from; None for an installed copy, which brings its own conf/ along.
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "conf" / "config.yaml").is_file() else None
CONF = (CHECKOUT or PACKAGE) / "conf"
HOME = CHECKOUT or Path.cwd()  # where runs, the default store and downloaded data go

# The keys of locations, with the option of commands without keys. Locations of data are arguments that are declared as such.
LOCATIONS = {
    "tracking.uri": "--tracking-uri",
    "tracking.experiment": "--experiment",
    "output_dir": "--output-dir",
    "tracking": None,
}
CONFIG_DIR = "--config-dir"
TRACKING = f"{NAME.upper()}_TRACKING"  # the variable that chooses the option of `tracking` for all commands
LOCAL = f"{NAME.upper()}_LOCAL"  # the variable that chooses the file of one's own defaults in conf/local, without .yaml
# The locations that this command line names, as text of overrides by key, and its --config-dir; set once by each command.
typed: dict[str, str] = {}

# user@ or user:password@ in the address of a server. A password may contain slashes and @: it extends to the last @ of the word.
_USER_PART = re.compile(r"([a-z][a-z0-9+.-]*://)([^/\s\"'@:]*)(?::([^\s\"]*))?@", re.IGNORECASE)


def config_dirs() -> list[Path]:
    """Return the folders with the files of options: conf/ and that of --config-dir."""
    return [CONF, *(Path(typed[name]).absolute() for name in (CONFIG_DIR,) if name in typed)]


def without_credentials(text: str) -> str:
    """Return text without the user and the password of the servers' addresses in it."""
    return _USER_PART.sub(r"\1", text)


def take_credentials(text: str) -> str:
    """Return text, such as an address or an override, without the user and the password of the tracking server in it.

    They become MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of this process and its children, so that no later code,
    record or stack trace contains them.
    """
    if found := _USER_PART.search(text):
        for name, value in (("USERNAME", found[2]), ("PASSWORD", found[3])):
            if value is not None:
                os.environ[f"MLFLOW_TRACKING_{name}"] = unquote(value)
    return without_credentials(text)
