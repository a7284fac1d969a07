"""The command line of the page: what can be wrong is said in one sentence, before anything slow is begun.

Imports neither torch nor Gradio at the top: they take seconds, and Gradio reads on import where its files go.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .embedded import place
from .temporary import own_temporary_folder

MODELS = Path(__file__).parents[2] / "assets" / "models"
INDEX = "model_index.json"
HUB_SECONDS = 20
PIPELINE = "SpectralARPipeline"


class StartError(Exception):
    """Why the page cannot start, in one sentence."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The SpectralAR demo page.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=os.environ.get("SPECTRALAR_MODEL", "").split(),
        help="folders of saved pipelines or Hub ids, the first is shown first (default: those in $SPECTRALAR_MODEL, "
        "with spaces between them, else all in assets/models, else all in runs)",
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these there is)")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--root-path", default=None, help="sub-path the page is served under, behind a proxy")
    parser.add_argument("--mcp", action="store_true", help="let agents use the endpoints as tools: gradio_api/mcp")
    parser.add_argument("--share", action="store_true", help="make a public link")
    options = parser.parse_args(arguments)
    options.model = options.model or own_models()
    return options


def find_models(folder: Path) -> list[Path]:
    """Folders of saved pipelines in `folder`, in the order in which the page shows them."""
    return sorted((path.parent for path in folder.glob(f"*/{INDEX}")), key=lambda path: place(path.name))


def own_models() -> list[Path]:
    """Models to show if none is named: of the clone this file is in, of the current folder, or trained there."""
    trained = sorted(path.parent for path in Path("runs").glob(f"*/pipeline/{INDEX}"))
    return find_models(MODELS) or find_models(Path("assets/models")) or trained


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted; ends the process with status 2 and a sentence where it cannot."""
    options = parse_arguments(arguments)
    try:
        check(options)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # else what stands below at `finally` is not done
        with _temporary_folder():
            serve(options)
    except StartError as error:
        print(f"spectralar: error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_temporary_folder())
        except OSError as error:
            raise StartError(f"no temporary folder can be made ({_reason(error)}): name one with $TMPDIR.") from None
        yield


# -------------------------------------------------------------------------------------------------- checks


def check(options: argparse.Namespace) -> None:
    """Looks at all that can be known without loading a model.

    Raises:
        StartError: about the first thing that is wrong.
    """
    if options.mcp and importlib.util.find_spec("mcp") is None:
        raise StartError("--mcp needs the packages of Gradio's extra: pip install 'gradio[mcp]'.")
    if importlib.util.find_spec("gradio") is None:
        raise StartError("the page needs Gradio: pip install gradio.")
    if not options.model:
        raise StartError(
            "there is no model in assets/models or runs here: name a saved pipeline's folder or a Hub id with --model."
        )
    check_address(options.host, options.port)
    for source in options.model:
        check_model(str(source))


def check_address(host: str, port: int | None) -> None:
    """Whether the page can be served there; without a port Gradio looks for a free one."""
    where = "--port"
    if port is None and "GRADIO_SERVER_PORT" in os.environ:
        where, port = "$GRADIO_SERVER_PORT", os.environ["GRADIO_SERVER_PORT"]
        port = int(port) if port.isdecimal() else -1
    if port is not None and not 0 <= port <= 65535:
        raise StartError(f"{where} must be a number between 0 and 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # a port is free as soon as its last server has ended
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        if port and _can_serve(host):
            raise StartError(f"port {port} cannot be had ({_reason(error)}): name another one with {where}.") from None
        raise StartError(f"the page cannot be served at --host {host} ({_reason(error)}).") from None


def _can_serve(host: str) -> bool:
    with contextlib.suppress(StartError):
        check_address(host, 0)
        return True
    return False


def check_model(source: str) -> None:
    """Whether there is a saved pipeline in a folder, or under a Hub id."""
    folder = Path(source)
    if folder.is_dir():
        _check_index(source, folder / INDEX)
    elif folder.exists():
        raise StartError(f"{source} is a file: name the folder of a saved pipeline.")
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or "\\" in source:
        raise StartError(f"there is no folder {source}: name a saved pipeline's, or a Hub id such as owner/name.")
    else:
        _check_index(source, _index_from_hub(source))


def _check_index(source: str, index: Path) -> None:
    if not index.is_file():
        raise StartError(f"the folder {source} holds no saved pipeline: there is no {INDEX} in it.")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StartError(f"the {INDEX} of {source} cannot be read: save the pipeline again.") from None
    if PIPELINE not in name:
        raise StartError(f"{source} holds a {name}, not a {PIPELINE}.")


def _index_from_hub(repo_id: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(repo_id, INDEX)
        if isinstance(cached, str):
            return Path(cached)
        HfApi().model_info(repo_id, timeout=HUB_SECONDS)  # says no at once, where a download would try again and again
        return Path(hf_hub_download(repo_id, INDEX))
    except HFValidationError:
        why = "it is no Hub id either"
    except RepositoryNotFoundError:
        why = "the Hub has no model of this name that you may see"
    except OfflineModeIsEnabled:
        why = "it has not been downloaded before, and HF_HUB_OFFLINE is set"
    except EntryNotFoundError:
        raise StartError(f"{repo_id} on the Hub holds no saved pipeline: there is no {INDEX} in it.") from None
    except HfHubHTTPError as error:
        why = f"the Hub did not give it ({_reason(error)})"
    except Exception as error:  # whatever a network has to offer
        why = f"the Hub cannot be reached ({_reason(error)})"
    raise StartError(f"there is no folder {repo_id}, and {why}.")


def _reason(error: BaseException) -> str:
    """What an exception says, in a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# -------------------------------------------------------------------------------------------------- the page


def serve(options: argparse.Namespace) -> None:
    """Loads the models and serves their page.

    Raises:
        StartError: for what is only known by trying.
    """
    from .model import Model, check_device, sample_apart
    from .page import build, launch_options
    from .threads import give_back_memory, limit_threads, share_memory_pools

    try:
        check_device(options.device)
    except ValueError as error:
        raise StartError(str(error)) from None
    share_memory_pools()
    give_back_memory()
    limit_threads()
    models = []
    for source in options.model:
        try:
            models.append(Model.load(source, options.device))
        except Exception as error:  # of several libraries, for files that are missing, cut short or of something else
            raise StartError(f"{source} cannot be loaded ({_reason(error)}).") from error
    limit_threads(*(model.pipe.transformer for model in models))
    sample_apart(models)
    try:
        page = build(*models)
    except OSError as error:
        raise StartError(f"the page's files cannot be written ({_reason(error)}): is the disk full?") from error
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            root_path=options.root_path,
            share=options.share,
            **launch_options(options.mcp),
        )
    except OSError as error:  # somebody took the port while the models were loaded
        raise StartError(f"the page cannot be served ({_reason(error)}).") from error
