"""The server's side of the page: a few routes below `/data/plugin/curvature`."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from keras_curvature.tensorboard import tags
from keras_curvature.tensorboard.plugin import reading

_STATIC = pathlib.Path(__file__).parent / "static"
_MIME_TYPES = {".js": "text/javascript", ".css": "text/css"}
# Steps of a run on a screen; the CSV has all of them.
_MOST_STEPS = 500
_MOST_PICTURES = 60


class CurvaturePlugin(base_plugin.TBPlugin):
    """Shows where a model is stiff, and how that changed.

    TensorBoard finds the class through the entry point `tensorboard_plugins`. It reads
    what `CurvatureWriter` wrote, and nothing else: no file is opened here.

    Args:
        context: What TensorBoard hands to every plugin.
    """

    plugin_name = tags.PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._reader = reading.Reader(context.data_provider)

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
            "/layers": self._answer(self._layers),
            "/layer": self._answer(self._layer),
            "/density": self._answer(self._density),
            "/histogram": self._answer(self._histogram),
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
        return _respond(request, {"runs": runs})

    def _table(self, request: Request, ctx: Any, experiment: str) -> Response:
        """A run's global figures, and which others it has."""
        run = self._reader.run(ctx, experiment, _wanted_runs(request)[0])
        shown = _shown(request, run)
        return _respond(
            request,
            {
                "steps": run.steps[shown].tolist(),
                "num_probes": len(run.steps),
                "layers": run.layers,
                "sizes": run.sizes,
                "figures": {k: reading.plain(v[shown]) for k, v in run.figures.items()},
                "layer_keys": run.layer_keys,
                "histograms": run.histograms,
                "density": run.has_density,
                "mode": run.mode,
            },
        )

    def _layers(self, request: Request, ctx: Any, experiment: str) -> Response:
        """One figure of a run's layers, `(layers, steps)`, at the table's steps.

        As numbers of four bytes one after the other, for they are many; none if the run
        does not have the figure.
        """
        name = _wanted_runs(request)[0]
        run = self._reader.run(ctx, experiment, name)
        key, rows = request.args.get("figure", ""), b""
        if key in run.layer_keys:
            values = self._reader.layers(ctx, experiment, name)
            shown = _shown(request, run)
            rows = (
                values[shown, :, tags.LAYER_KEYS.index(key)].T.astype("<f4").tobytes()
            )
        return http_util.Respond(request, rows, "application/octet-stream")

    def _layer(self, request: Request, ctx: Any, experiment: str) -> Response:
        """All figures of one layer of a run, at the table's steps."""
        name = _wanted_runs(request)[0]
        run = self._reader.run(ctx, experiment, name)
        layer, figures = request.args.get("layer", ""), {}
        if layer in run.layers:
            values = self._reader.layers(ctx, experiment, name)
            shown = _shown(request, run)
            own = reading.plain(values[shown, run.layers.index(layer)].T)
            by_key = dict(zip(tags.LAYER_KEYS, own, strict=True))
            figures = {key: by_key[key] for key in run.layer_keys}
        return _respond(request, {"figures": figures})

    def _density(self, request: Request, ctx: Any, experiment: str) -> Response:
        """A run's spectral densities, evenly spaced where there are many."""
        found = self._reader.density(ctx, experiment, _wanted_runs(request)[0])
        shown = reading.columns(len(found), _MOST_PICTURES)
        return _respond(
            request,
            [
                {
                    "step": found[i][0],
                    **dict(
                        zip(
                            ("grid", "density", "standard_error"),
                            map(reading.plain, found[i][1]),
                            strict=True,
                        )
                    ),
                }
                for i in shown
            ],
        )

    def _histogram(self, request: Request, ctx: Any, experiment: str) -> Response:
        """The histograms of a tag: lower ends, upper ends and counts of their bins."""
        found = self._reader.histograms(
            ctx, experiment, _wanted_runs(request)[0], request.args.get("tag", "")
        )
        shown = reading.columns(len(found), _MOST_PICTURES)
        return _respond(
            request,
            [{"step": found[i][0], "bins": found[i][1].tolist()} for i in shown],
        )

    def _csv(self, request: Request, ctx: Any, experiment: str) -> Response:
        runs = [
            (
                run,
                self._reader.run(ctx, experiment, run),
                self._reader.layers(ctx, experiment, run),
            )
            for run in _wanted_runs(request)
        ]
        headers = {"Content-Disposition": 'attachment; filename="curvature.csv"'}
        # Sent as it is written: every figure of every probe is much.
        return Response(reading.to_csv(runs), headers=headers, mimetype="text/csv")


def _shown(request: Request, run: reading.Run) -> np.ndarray:
    """Which probes to show, so that all answers to a page have the same steps.

    A page that read so many probes (`probes`) asks for no others until it reads anew.
    """
    count = request.args.get("probes", len(run.steps), type=int)
    return reading.columns(min(count, len(run.steps)), _MOST_STEPS)


def _respond(request: Request, content: Any) -> Response:
    # Written here: TensorBoard would look at each number first, for what JSON lacks.
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return http_util.Respond(request, text, "application/json")


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
