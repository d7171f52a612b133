"""One way to tell the user something during a run: through ``logging``, once for all processes that train together."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


@rank_zero_only
def announce(message: str) -> None:
    """Log ``message`` from the main process; the ``seqzoo`` command shows it on the terminal."""
    log.info(message)
