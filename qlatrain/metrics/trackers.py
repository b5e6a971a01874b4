"""wandb through accelerate: one run id for all the lives of a run, no questions asked, no rows lost.

Three things need care.

- accelerate's wandb tracker calls `wandb.init(project=..., **init_kwargs["wandb"])` and nothing more, so the id under
  which a resumed run goes on has to come from here. It is kept in the checkpoint (`Tracker.id`).
- wandb asks for a key on the terminal when it finds none. Without a key a run is recorded offline instead.
- wandb's own step may only grow: a row with a smaller one is dropped with a warning. A run killed after its last
  checkpoint does some steps twice. So training's step is logged as a value, `step`, and made the x axis of every
  chart; wandb's own step runs ahead of it where it has to.
"""

import difflib
import importlib.util
import netrc
import os
import secrets
import string
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qlatrain.config import TrackConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

BACKENDS = ("wandb",)
# wandb also takes the key kept for the address its server had before
_OLDER_HOSTS = {"api.forge.coreweave.com": "api.wandb.ai"}


class Tracker:
    """Reports a run to the backend of a `TrackConfig`, or to nobody.

    Two steps, because accelerate wants its trackers named at construction and started later:

        tracker = Tracker(config.track, run_name, run_dir, saved_id, full_config)
        accelerator = Accelerator(log_with=tracker.log_with, ...)
        tracker.start(accelerator)
        tracker.log({"loss": 2.5}, step=1)

    saved_id: the `id` of the run that is being resumed, from its checkpoint; None for a new one.
    config: the resolved config, stored with the run; plain dicts, lists and scalars.

    `id` is what the checkpoint should keep, None without a backend. Each process makes up its own for a new run, and
    the main process's is the one in use: save that one. `note` is a line for the log, or None.

    Raises `ValueError` for an unknown backend, or one whose package is not installed.
    """

    def __init__(
        self,
        track: TrackConfig,
        run_name: str,
        run_dir: str | Path,
        saved_id: str | None = None,
        config: dict | None = None,
    ):
        _check_backend(track.backend)
        self._track, self._config = track, config or {}
        # None and not []: accelerate warns of an empty list
        self.log_with: list[str] | None = [track.backend] if track.backend else None
        self.id, self.note = None, None
        self.init_kwargs: dict[str, dict] = {}
        self._accelerator: Accelerator | None = None
        self._next_step = 0  # the smallest step wandb still takes
        if track.backend == "wandb":
            self.id = saved_id or _new_id()
            self.init_kwargs["wandb"], self.note = self._wandb_kwargs(run_name, Path(run_dir), saved_id is not None)

    def start(self, accelerator: "Accelerator") -> None:
        """Begins tracking, under the saved id or the new one. The accelerator was built with `log_with`."""
        self._accelerator = accelerator
        if not self.log_with:
            return
        # wandb falls back to a temporary folder when this one is missing
        Path(self.init_kwargs["wandb"]["dir"]).mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(self._track.project, config=self._config, init_kwargs=self.init_kwargs)
        if accelerator.is_main_process:
            run = accelerator.get_tracker("wandb", unwrap=True)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            # online, a resumed run stands behind its last row; asked once, because the answer takes a round trip
            self._next_step = run.step

    def log(self, values: dict, step: int) -> None:
        """Sends a row of `step`. Steps may repeat and go back; no row is dropped. None values are left out."""
        assert self._accelerator is not None, "Tracker.log() before Tracker.start()"
        if not self.log_with:
            return
        wandb_step = max(step, self._next_step)
        self._next_step = wandb_step + 1
        # commit: wandb would otherwise keep the row until the next one, and a kill would lose it
        values = {key: value for key, value in values.items() if value is not None} | {"step": step}
        self._accelerator.log(values, step=wandb_step, log_kwargs={"wandb": {"commit": True}})

    def finish(self) -> None:
        """Closes the run. wandb's own process writes out the rest; it is waited for when Python exits."""
        if self._accelerator is not None and self.log_with:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def _wandb_kwargs(self, run_name: str, run_dir: Path, resumed: bool) -> tuple[dict, str]:
        """Arguments of `wandb.init` beside the project, and the line to print."""
        track = self._track
        kwargs = {"id": self.id, "resume": "allow", "name": run_name, "dir": str(run_dir)}
        if track.entity:
            kwargs["entity"] = track.entity
        if track.tags:
            kwargs["tags"] = list(track.tags)
        run = f"wandb: {'going on with' if resumed else 'new'} run {self.id} of project {track.project}"
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return kwargs, f"{run}, WANDB_MODE={os.environ['WANDB_MODE']}"
        if not has_wandb_key():
            kwargs["mode"] = "offline"
            where = run_dir / "wandb"
            return (
                kwargs,
                f"{run}, offline in {where}: no API key (WANDB_API_KEY or `wandb login`); `wandb sync` sends it",
            )
        return kwargs, run


def has_wandb_key() -> bool:
    """Whether wandb can sign in without asking: by WANDB_API_KEY, an identity token, its settings or a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).netloc
    hosts = [host, _OLDER_HOSTS.get(host, host)]
    named = os.environ.get("NETRC")
    paths = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(_netrc_knows(path.expanduser(), host) for path in paths for host in hosts)


def _netrc_knows(path: Path, host: str) -> bool:
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {list(BACKENDS)}."
        raise ValueError(f"track.backend is {backend!r}; {hint} With null, metrics.jsonl alone is written")
    if importlib.util.find_spec(backend) is None:
        # accelerate would leave a missing tracker out without a word
        raise ValueError(f"track.backend is {backend!r}, which is not installed: pip install {backend}")


def _new_id() -> str:
    """Eight characters, as wandb makes them; not from the run's random state, which has to repeat."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
