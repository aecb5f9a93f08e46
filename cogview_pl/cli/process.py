"""Settings of this process that hold for every run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings

from cogview_pl.cli.messages import report_thread_error
from cogview_pl.cli.streams import use_forgiving_streams, use_utf8_file_names
from cogview_pl.runs.ranks import RANKS, forget_stale_variables
from cogview_pl.runs.side_by_side import end_with_the_chain


def prepare_process() -> None:
    """Set up file names, output streams, environment variables and the handling of errors."""
    use_utf8_file_names()
    use_forgiving_streams()
    forget_stale_variables()
    end_with_the_chain()
    if not RANKS.first:  # the first process says the same
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run listens, Ctrl-C just ends the process
    threading.excepthook = report_thread_error
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for classes in files of the user, which a `_target_` names
    # Our files for these launchers set other defaults than their plugin, under the same names.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_\w+' is validated against ConfigStore schema")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
