"""Experiments as choices of `experiment=`: a source of configurations for Hydra.

Hydra's own store would copy all experiments for every configuration that it composes. A source reads the file of the
chosen one only, so a broken file concerns only who asks for it.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from cogview_pl.config.shipped import experiments
from cogview_pl.errors import UserError

_GROUP = "experiment"
_SCHEME = "cogview-experiments"
_PROVIDER = "cogview_pl"


class ExperimentSource(ConfigSource):
    """The group `experiment`: every `experiments/NAME/config.yaml`, shipped or in the working folder."""

    @staticmethod
    def scheme() -> str:
        """Scheme of the address in the search path."""
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one experiment.

        Raises:
            UserError: its file is no YAML with keys and values.
        """
        name = _name(config_path)
        file = experiments().get(name or "")
        if file is None:
            raise ConfigLoadError(f"{config_path} is no experiment")
        try:
            node = OmegaConf.load(file)
        except (YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"experiment={name}: {file} cannot be read ({error}); mend the file") from error
        if not isinstance(node, DictConfig):
            raise UserError(f"experiment={name}: {file} must hold keys with values, and is a list; mend the file")
        return ConfigResult(
            config=node, path=f"{self.scheme()}://", provider=self.provider, header={"package": "_global_"}
        )

    def available(self) -> bool:
        """There are always the shipped ones."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether the path is the group of experiments."""
        return config_path.strip("/") == _GROUP

    def is_config(self, config_path: str) -> bool:
        """Whether the path is an experiment."""
        name = _name(config_path)
        return name is not None and name in experiments()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the experiments."""
        if results_filter is ObjectType.GROUP:
            return []
        return sorted(experiments())


class ExperimentSearchPath(SearchPathPlugin):
    """Adds the experiments to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source."""
        search_path.append(_PROVIDER, f"{_SCHEME}://")


def register_experiments() -> None:
    """Make the experiments known to Hydra."""
    for plugin in (ExperimentSource, ExperimentSearchPath):
        Plugins.instance().register(plugin)


def _name(config_path: str) -> str | None:
    """Name of the experiment at a path of Hydra, None for another path."""
    group, _, name = config_path.strip("/").rpartition("/")
    return name.removesuffix(".yaml") if group == _GROUP else None
