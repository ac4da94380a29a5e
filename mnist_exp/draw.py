"""Command: draw digits in the browser and see the model's predictions: python -m mnist_exp.draw --model latest."""

import argparse

from mnist_exp import cli
from mnist_exp.console import show_lines, show_warning
from mnist_exp.errors import UserError

SECONDS_TO_END = 2  # for requests that are still answered after Ctrl-C


def main() -> None:
    """Serve the drawing page on this machine until Ctrl-C."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        draw(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("draw", "Draw digits in the browser, and see the model's predictions.")
    result.add_argument(
        "--model", default="latest", help="a run (its id or the start of one), latest, models:/NAME@ALIAS, or a folder"
    )
    result.add_argument("--port", type=int, default=8000, help="0: any free port (default: 8000)")
    return result


def draw(arguments: argparse.Namespace) -> None:
    """Load the model, print the link and serve the page."""
    import uvicorn

    from mnist_exp.serving.classifier import load_from
    from mnist_exp.serving.page import create_app

    with cli.listen(arguments.port) as server:
        classifier = load_from(cli.default_settings(), arguments.model)
        if classifier.data.preparation != "handwriting":
            raise UserError.invalid("--model", arguments.model, "a model of handwriting", "Use predict with files.")
        port = server.getsockname()[1]
        show_lines([f"http://127.0.0.1:{port}", f"Model: {classifier.summary}", "Stop the server with Ctrl-C."])
        if classifier.warning:
            show_warning(classifier.warning)
        config = uvicorn.Config(create_app(classifier, port), log_level="warning", timeout_graceful_shutdown=SECONDS_TO_END)
        uvicorn.Server(config).run(sockets=[server])


if __name__ == "__main__":
    main()
