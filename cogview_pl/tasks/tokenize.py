"""task=tokenize: captioned images, or the parts of a token store → token store."""

from __future__ import annotations

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.joined_parts import join_runs
from cogview_pl.assembly.models import newest_image_tokenizer
from cogview_pl.assembly.tokenization import Tokenization, tokenise
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.sharing import Team
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Tokenise both splits with the newest image tokenizer, or join finished parts; returns counts and speed."""
    if config.token_store.join is not None:
        if config.token_store.part is not None or config.token_store.parts is not None:
            raise UserError("token_store.join joins finished parts; leave token_store.part and token_store.parts out")
        return join_runs(config.token_store.join, config.data.max_skipped_share, folder) if team.first else {}
    device, _ = inference_device(config.trainer, config.precision)
    options = Tokenization(config.data, config.token_store, config.text, config.template, config.verify, device)
    return tokenise(options, newest_image_tokenizer(model_options(config)), None, folder, folder.path, team)
