"""flash-linear-attention's own dispatcher, which hands the gated delta rule to FlashQLA or is kept from it.

FLA 0.6.0 gives `chunk_gated_delta_rule` to FlashQLA whenever that is installed and takes the call, so a row called fla
would measure FlashQLA. `FLA_FLASH_QLA=0`, read at each call, turns that off. The rest of its dispatcher stays on: on
Hopper with Triton from 3.4 to 3.7 FLA itself runs one kernel of the backward (`chunk_bwd_dqkwg`) in TileLang, since
Triton compiles it wrongly, and refuses to run without. What it chose is read from its log.
"""

import logging
import os

from qlakernels.gated_delta_rule.peers import FLA_SWITCH as SWITCH

LOGGER = "fla.backends"


class FlaDispatch(logging.Handler):
    """Use `switched_off()` or `switched_on()`, before FLA is called for the first time: it logs each choice once."""

    _instance: "FlaDispatch | None" = None

    def __init__(self):
        super().__init__(logging.INFO)
        self.choices: list[str] = []  # such as `common.chunk_bwd_dqkwg -> tilelang`

    @classmethod
    def switched_off(cls) -> "FlaDispatch":
        """Turns FlashQLA off for FLA in this process, and listens to what FLA chooses."""
        return cls._listening("0")

    @classmethod
    def switched_on(cls) -> "FlaDispatch":
        """Lets FLA hand calls to FlashQLA in this process, and listens to what FLA chooses."""
        return cls._listening("1")

    @classmethod
    def _listening(cls, switch: str) -> "FlaDispatch":
        os.environ[SWITCH] = switch
        if cls._instance is None:
            cls._instance = cls()
            logger = logging.getLogger(LOGGER)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.addHandler(cls._instance)
        return cls._instance

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().removeprefix("[FLA Backend] ")
        if "->" in line and "rejected" not in line:
            self.choices.append(line)

    def check(self) -> None:
        """Raises RuntimeError when FLA handed a call to FlashQLA all the same."""
        for choice in self.choices:
            if choice.endswith("flash_qla"):
                raise RuntimeError(f"FLA handed the call to FlashQLA ({choice}) in spite of {SWITCH}=0")

    def note(self) -> str:
        """For the row."""
        others = f"; FLA itself chose {', '.join(self.choices)}" if self.choices else ""
        return f"{SWITCH}=0, so that FLA runs its own kernels and not FlashQLA's{others}"
