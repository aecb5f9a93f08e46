"""task=tokenize: captioned images → token store."""

from __future__ import annotations

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.models import newest_image_tokenizer
from cogview_pl.assembly.tokenization import Tokenization, tokenise
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.sharing import Team
from cogview_pl.runs.run_folder import RunFolder


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Tokenise both splits with the newest image tokenizer; returns counts and speed."""
    device, _ = inference_device(config.trainer, config.precision)
    options = Tokenization(config.data, config.token_store, config.text, config.template.layout, config.verify, device)
    return tokenise(options, newest_image_tokenizer(model_options(config)), None, folder, folder.path, team)
