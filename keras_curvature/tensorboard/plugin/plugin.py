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
_SCRIPT = "index.js"
_MIME_TYPES = {".js": "text/javascript", ".css": "text/css"}
# Steps of a run on a screen, which the reader may exceed; the CSV has all of them.
_MOST_STEPS = 550
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
            es_module_path=f"/{_SCRIPT}", tab_name="Curvature"
        )

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """The routes."""
        routes: dict[str, Callable[..., Any]] = {
            f"/{path.name}": _serve_file(path)
            for path in _STATIC.iterdir()
            if path.suffix in _MIME_TYPES
        }
        return routes | {
            f"/{_SCRIPT}": self._answer(self._open),
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

    def _open(self, request: Request, ctx: Any, experiment: str) -> Response:
        """The page's script, and the sign that it will ask for figures soon.

        They are read while the browser loads what else it needs.
        """
        self._reader.read_ahead(ctx, experiment)
        return _file(request, _STATIC / _SCRIPT)

    def _runs(self, request: Request, ctx: Any, experiment: str) -> Response:
        runs = self._reader.runs(ctx, experiment)
        return _respond(request, {"runs": runs})

    def _table(self, request: Request, ctx: Any, experiment: str) -> Response:
        """A run's global figures, and which others it has."""
        run = self._reader.run(ctx, experiment, _part(request))
        shown = _shown(request, run)
        return _respond(
            request,
            {
                "steps": run.steps[shown].tolist(),
                "every": run.every,
                "num_probes": run.num_probes,
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
        run = self._reader.layers(ctx, experiment, _part(request))
        key, rows = request.args.get("figure", ""), b""
        if key in run.layer_keys:
            shown = _shown(request, run)
            rows = run.of_layers(key)[shown].T.astype("<f4").tobytes()
        return http_util.Respond(request, rows, "application/octet-stream")

    def _layer(self, request: Request, ctx: Any, experiment: str) -> Response:
        """All figures of one layer of a run, at the table's steps."""
        run = self._reader.layers(ctx, experiment, _part(request))
        layer, figures = request.args.get("layer", ""), {}
        if layer in run.layers:
            shown = _shown(request, run)
            own = reading.plain(run.by_layer[shown, run.layers.index(layer)].T)
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
        wanted = _wanted_runs(request)
        for run in wanted:
            # An error can be told as long as nothing has been sent.
            self._reader.run(ctx, experiment, reading.Part(run))
        headers = {"Content-Disposition": 'attachment; filename="curvature.csv"'}
        # Read and sent as it is written: every figure of every probe is much.
        runs = (
            (run, self._reader.layers(ctx, experiment, reading.Part(run, every=1)))
            for run in wanted
        )
        return Response(reading.to_csv(runs), headers=headers, mimetype="text/csv")


def _shown(request: Request, run: reading.Run) -> np.ndarray:
    """Which probes to show, so that all answers to a page have the same steps.

    A page whose table ends with a step (`last`) shows no others until it reads anew.
    """
    last = request.args.get("last", None, type=int)
    count = len(run.steps) if last is None else int((run.steps <= last).sum())
    return reading.columns(count, _MOST_STEPS)


def _part(request: Request) -> reading.Part:
    every, last = (request.args.get(k, None, type=int) for k in ("every", "last"))
    return reading.Part(_wanted_runs(request)[0], every, last)


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
        return _file(request, path)

    return serve


def _file(request: Request, path: pathlib.Path) -> Response:
    return http_util.Respond(request, _content(path), _MIME_TYPES[path.suffix])


@functools.lru_cache
def _content(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")
