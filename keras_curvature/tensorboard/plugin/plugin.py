"""The server's side of the page: a few routes below `/data/plugin/curvature`."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from keras_curvature.tensorboard import tags
from keras_curvature.tensorboard.plugin import reading

_STATIC = pathlib.Path(__file__).parent / "static"
_MIME_TYPES = {".js": "text/javascript", ".css": "text/css"}
_DEFAULT_DOWNSAMPLING = 500


class CurvaturePlugin(base_plugin.TBPlugin):
    """Shows where a model is stiff, and how that changed.

    TensorBoard finds the class through the entry point `tensorboard_plugins`. It reads
    what `CurvatureWriter` wrote, and nothing else: no file is opened here.

    Args:
        context: What TensorBoard hands to every plugin.
    """

    plugin_name = tags.PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        hints = context.sampling_hints or {}
        self._reader = reading.Reader(
            context.data_provider,
            hints.get(self.plugin_name) or _DEFAULT_DOWNSAMPLING,
        )

    def is_active(self) -> bool:
        """Whether to show the tab before any data was found that belongs to us.

        TensorBoard itself sees which runs hold data of a plugin.
        """
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name and its script."""
        return base_plugin.FrontendMetadata(
            es_module_path="/index.js", tab_name="Curvature"
        )

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """The routes."""
        routes: dict[str, Callable[..., Any]] = {
            f"/{path.name}": _serve_file(path)
            for path in _STATIC.iterdir()
            if path.suffix in _MIME_TYPES
        }
        return routes | {
            "/runs": self._answer(self._runs),
            "/table": self._answer(self._table),
            "/csv": self._answer(self._csv),
        }

    @staticmethod
    def _answer(handler: Callable[..., Response]) -> Callable[..., Any]:
        @Request.application
        def answer(request: Request) -> Response:
            return handler(
                request,
                plugin_util.context(request.environ),
                plugin_util.experiment_id(request.environ),
            )

        return answer

    def _runs(self, request: Request, ctx: Any, experiment: str) -> Response:
        runs = self._reader.runs(ctx, experiment)
        return http_util.Respond(request, {"runs": runs}, "application/json")

    def _table(self, request: Request, ctx: Any, experiment: str) -> Response:
        runs = _wanted_runs(request)
        table = self._read(ctx, experiment, runs[0])
        return http_util.Respond(request, dataclasses.asdict(table), "application/json")

    def _csv(self, request: Request, ctx: Any, experiment: str) -> Response:
        runs = _wanted_runs(request)
        text = reading.to_csv((run, self._read(ctx, experiment, run)) for run in runs)
        headers = [("Content-Disposition", 'attachment; filename="curvature.csv"')]
        return http_util.Respond(request, text, "text/csv", headers=headers)

    def _read(self, ctx: Any, experiment: str, run: str) -> reading.Table:
        table = self._reader.table(ctx, experiment, run)
        if table is None:
            raise errors.NotFoundError(
                f"There is no run with this name that has curvature. "
                f"Received: run={run!r}"
            )
        return table


def _wanted_runs(request: Request) -> list[str]:
    runs = request.args.getlist("run")
    if not runs:
        raise errors.InvalidArgumentError(
            "Name the run to read, as in ?run=run1/curvature. Received: no run"
        )
    return runs


def _serve_file(path: pathlib.Path) -> Callable[..., Any]:
    @Request.application
    def serve(request: Request) -> Response:
        return http_util.Respond(request, _content(path), _MIME_TYPES[path.suffix])

    return serve


@functools.lru_cache
def _content(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")
