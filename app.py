"""Builds and launches the demo page: python app.py [--model FOLDER_OR_HUB_ID ...]"""

import argparse
import importlib.util
import os
from pathlib import Path

try:
    import spaces  # noqa: F401  (on ZeroGPU it must come before torch)
except ImportError:
    pass

from spectralar.demo.model import Model, find_models
from spectralar.demo.page import build, launch_options
from spectralar.demo.threads import limit_threads

MODELS = Path(__file__).parent / "assets" / "models"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The SpectralAR demo page.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=os.environ.get("SPECTRALAR_MODEL", "").split(),
        help="folders of saved pipelines or Hub ids, the first is shown first (default: those in $SPECTRALAR_MODEL, "
        "with spaces between them, else all in assets/models)",
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these there is)")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--root-path", default=None, help="sub-path the page is served under, behind a proxy")
    parser.add_argument("--mcp", action="store_true", help="let agents use the endpoints as tools: gradio_api/mcp")
    parser.add_argument("--share", action="store_true", help="make a public link")
    options = parser.parse_args(arguments)
    if options.mcp and importlib.util.find_spec("mcp") is None:
        parser.error("--mcp needs the packages of Gradio's extra: pip install 'gradio[mcp]'.")
    options.model = options.model or find_models(MODELS)
    if not options.model:
        parser.error(f"there is no model in {MODELS}: name a saved pipeline's folder or a Hub id with --model.")
    return options


def main() -> None:
    options = parse_arguments()
    limit_threads()
    models = [Model.load(source, options.device) for source in options.model]
    build(*models).launch(
        server_name=options.host,
        server_port=options.port,
        root_path=options.root_path,
        share=options.share,
        **launch_options(options.mcp),
    )


if __name__ == "__main__":
    main()
