"""The Frequency bands tab: which frequencies an image has, which of them its tokens bring, and which they carry."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from ..analysis import plots
from ..analysis.chart import Chart
from ..analysis.contributions import Contributions, energy, influence_steps, token_contributions
from ..analysis.statistics import code_marginals
from ..interface.image import to_model_input
from ..spectral import band_energy, dct2, radial_power_spectrum
from .cache import write_whole
from .errors import one_sentence, user_error
from .figures import FORMATS, chart_bytes, figure, listen_to_saves, shown, tables
from .folder import beside_the_bound, cutoff_law, model_statistics
from .links import Link, Linked
from .model import Model, on_gpu, to_pixels
from .pictures import log_spectrum, own_gains, signed_map
from .scrubber import StripEncoder, scrubber, scrubber_value
from .source import TOKENIZER, Origins, Picture, opening_origin, pick_script, sample_examples, source
from .upload import PhotoInput

TITLE = "Frequency bands"
INFLUENCE_IMAGES = 8  # that the influence is averaged over,
INFLUENCE_DRAWS = 4  # with so many other codes for each token of each
MARGINAL_SAMPLES = 128  # where the model's folder has no statistics
NUM_SPECTRA = 4

FIGURES = {
    "nested_squares": (
        "Nested squares",
        "Log magnitude of the image's DCT, mean over its channels, and where some prefixes end: k tokens can hold "
        "what lies inside their square. It does not show how well they hold it.",
    ),
    "band_energies": (
        "Energy by band",
        "Energy in the band that each token opens, in the image and in its reconstruction from all tokens. Equal "
        "energies do not mean equal pictures: phases can still differ. A sample is its own reconstruction.",
    ),
    "radial_spectra": (
        "Radial power spectrum",
        "Mean power by distance from the origin, for the image and for prefixes, with the 1/f² of natural images laid "
        "through the image's low frequencies. Direction is averaged away.",
    ),
    "contributions": (
        "What each token changes",
        "The step from one prefix to the next, each on its own scale, and how its energy divides between bands that "
        "were open and the token's own. Part of a new band would be there whatever the code said: see the influence.",
    ),
    "influence": (
        "What each token carries",
        "Energy that moves, by radial frequency, when a token's code is drawn from all codes of its position instead. "
        "The mean over images sampled from the model: it does not show what later tokens would have put right.",
    ),
}


# -------------------------------------------------------------------------------------------------- numbers


class Analysis:
    """A picture with its prefixes and what each token changes."""

    def __init__(self, model: Model, picture: Picture) -> None:
        self.model, self.picture = model, picture
        self.frames: Tensor = model.decode_prefixes(picture.codes)  # (N, C, H, H), not clamped
        parts = token_contributions(self.frames[None], model.cutoffs)
        self.parts = Contributions(*(part[0] for part in parts))
        self.refining, self.opening = energy(self.parts.refinement), energy(self.parts.opening)  # (N,)

    def charts(self) -> Iterator[tuple[str, Chart]]:
        """The figures of the picture, by name, one after another."""
        image, frames, cutoffs = self.picture.image, self.frames, self.model.cutoffs
        magnitude = dct2(image).square().mean(dim=0).sqrt()
        yield "nested_squares", plots.nested_squares(magnitude.clamp(min=1e-6).log10(), cutoffs)
        series = {"image": image, "reconstruction": frames[-1]}
        energies = {name: band_energy(x, cutoffs) for name, x in series.items()}
        yield "band_energies", plots.band_energies(energies, cutoffs)
        n = len(frames)
        lengths = sorted({max(1, round(n * 2.0**-i)) for i in range(NUM_SPECTRA)})
        series = {"image": image} | {f"k = {k}": frames[k - 1] for k in lengths}
        yield "radial_spectra", plots.radial_spectra({name: radial_power_spectrum(x)[1] for name, x in series.items()})
        delta = self.parts.refinement + self.parts.opening
        yield "contributions", plots.contribution_gallery(delta, self.refining, self.opening, cutoffs)

    def value(self) -> dict[str, Any]:
        """The scrubber's: image, prefix, its spectrum, and the token's two parts."""
        model, image = self.model, self.picture.image
        groups = [
            {"title": "Pictures", "captions": ["Image", "First k tokens", "Token k in open bands", "in its own band"]},
            {"title": "Spectra", "captions": ["its spectrum, log scale", "", "", ""]},
        ]
        peak = float(dct2(image).abs().mean(dim=-3).max().clamp(min=1e-6))
        parts = (self.parts.refinement, self.parts.opening)
        gain = own_gains(*parts)  # (N, 1, 1, 1)
        columns = [to_pixels((self.frames / 2 + 0.5).clamp(0, 1)), *(signed_map(part, gain) for part in parts)]
        columns += [log_spectrum(x, peak) for x in (self.frames, *parts)]
        original, original_spectrum = to_pixels((image / 2 + 0.5).clamp(0, 1)), log_spectrum(image, peak)
        value = scrubber_value(groups, model.cutoffs, model.image_size, model.codebook_size, name="bands")
        encoder = StripEncoder(model.num_tokens)
        for k in range(model.num_tokens):
            rest = [column[k] for column in columns]
            value["frames"].append(encoder.encode([original, *rest[:3], original_spectrum, *rest[3:]]))
        share = self.opening / (self.refining + self.opening).clamp(min=1e-30)
        series = [{"name": "in its own band", "values": [round(v, 4) for v in share.tolist()]}]
        value["charts"] = [
            {"title": "Share of the token's energy", "unit": "", "digits": 2, "low": 0, "high": 1, "series": series}
        ]
        return value


# -------------------------------------------------------------------------------------------------- influence


class Influence:
    """The influence matrix of a model, measured once for all visitors.

    Where a visitor leaves in the middle, the next one who asks goes on from there.
    """

    def __init__(self, model: Model, origins: Origins) -> None:
        self.model, self.origins = model, origins
        self.charts: dict[str, Chart] = {}
        self.marginals = ""  # what the other codes were drawn from
        self._rows: list[Tensor] = []  # measured so far
        self._more: Iterator[Tensor] | None = None  # measures the others
        self._measure = on_gpu(self._influence_steps)

    def steps(self) -> Iterator[tuple[float, str]]:
        """Measures, with the part done and a word on it; afterwards there is a chart."""
        if self.charts:
            return
        if self._more is None:
            yield 0.0, "Sampling images"
            self._more = self._begin()
        n = self.model.num_tokens
        try:
            for row in self._more:
                self._rows.append(row)
                yield len(self._rows) / n, f"Token {len(self._rows)} of {n}"
        except Exception:  # a generator that has failed has nothing more to give
            self._rows, self._more = [], None
            raise
        self.charts["influence"] = plots.influence(torch.stack(self._rows), self.model.cutoffs)

    def _begin(self) -> Iterator[Tensor]:
        statistics = model_statistics(self.model)
        count = INFLUENCE_IMAGES if statistics else MARGINAL_SAMPLES
        num_classes = len(self.model.class_names)
        rows = self.origins.codes([i * num_classes // count for i in range(count)], seed=0)
        codes = torch.tensor(rows, dtype=torch.int64, device="cpu")
        if statistics:
            marginals, self.marginals = statistics.code_counts, "held-out images"
        else:
            marginals, self.marginals = code_marginals(codes, self.model.codebook_size), f"{count} sampled images"
        spread = torch.arange(INFLUENCE_IMAGES, dtype=torch.int64, device="cpu") * count // INFLUENCE_IMAGES
        return self._measure(codes[spread], marginals)

    def _influence_steps(self, codes: Tensor, marginals: Tensor) -> Iterator[Tensor]:
        codes = codes.to(self.model.pipe.device)
        yield from influence_steps(self.model.pipe.tokenizer, codes, marginals, INFLUENCE_DRAWS)


# -------------------------------------------------------------------------------------------------- the tab


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    origins = Origins(model)
    influence = Influence(model, origins)
    held = gr.State(None)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300):
            picture = source(origins, "Image", "bands-image", height=220)
            tried, labels = sample_examples(model)
            examples = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[[text] for text in labels], type="index",
                label="Try", elem_id="bands-try",
            )  # fmt: skip
            measure = gr.Button("Measure the influence of tokens", elem_id="measure-influence")
            gr.Markdown(
                f"Compares true codes with {INFLUENCE_DRAWS} others each on {INFLUENCE_IMAGES} sampled images; "
                "once measured it is kept.",
                elem_classes="note",
            )
            law = f"Cutoffs {cutoff_law(model)}."
            if bound := beside_the_bound(model):
                law += f" PSNR / Gaussian bound on held-out images: {bound}."
            gr.Markdown(law, elem_classes="note", elem_id="bands-law")
        with gr.Column(scale=7, min_width=320):
            view = scrubber(
                hint="Choose an image or draw a sample: its spectrum, and what every token adds to it.",
                elem_id="bands-view",
            )
    figures = {}
    names = list(FIGURES)
    for row in (names[:2], names[2:4], names[4:]):
        with gr.Row(elem_classes="split"):
            for name in row:
                figures[name] = figure(*FIGURES[name], elem_id=f"figure-{name.replace('_', '-')}")

    own = names[:-1]  # figures of the visitor's picture

    def analyse(origin: str, photo: Image.Image | None) -> Iterator[dict]:
        if not origin and photo is None:
            yield {view: None, held: None} | {figures[name]: None for name in own}
            return
        with one_sentence():
            analysis = Analysis(model, origins.picture(origin, photo))
        value = analysis.value()
        drawn = {}
        yield {view: value | {"busy": True, "status": "Drawing the figures"}}
        for name, chart in analysis.charts():
            drawn[figures[name]] = shown(chart)
            yield {figures[name]: drawn[figures[name]]}
        # All figures once more: a browser that is still putting up the tab may have missed one.
        yield {view: value, held: analysis.picture} | drawn

    def draw_influence(progress: gr.Progress = gr.Progress()) -> Iterator[Any]:  # noqa: B008  (Gradio's way)
        for part, description in influence.steps():
            progress(part, desc=description)
            yield gr.skip()  # only here can a visitor leave
        yield shown(influence.charts["influence"])

    options = {**TOKENIZER, "api_visibility": "private"}
    picture.listen(analyse, [view, held, *(figures[name] for name in own)], show_progress="hidden", **options)
    examples.click(None, examples, picture.origin, js=pick_script(tried))
    measure.click(
        draw_influence, None, figures["influence"], concurrency_id="influence", concurrency_limit=1,
        api_visibility="private", show_progress_on=measure,
    )  # fmt: skip

    def charts_of(picture: Picture) -> dict[str, Chart]:
        return dict(Analysis(model, picture).charts())

    listen_to_saves({name: figures[name] for name in own}, charts_of, held, "bands-file")
    listen_to_saves({"influence": figures["influence"]}, lambda _: influence.charts, None, "influence-file")
    _add_endpoints(model, influence)

    @cache
    def opening() -> dict:
        """What a visitor sees first: an example, analysed once for all visitors."""
        *_, last = analyse(opening_origin(origins), None)
        return last

    def open_with_example(item: gr.Tab) -> None:
        outputs = [view, held, *(figures[name] for name in own)]
        picture.open_with(item, "bands", opening, outputs, show_progress="hidden", **options)

    return Linked([Link("bands", picture.origin)], [], open_with_example)


def _add_endpoints(model: Model, influence: Influence) -> None:
    def analysis_of(image: Image.Image | None) -> Analysis:
        if image is None:
            raise user_error("Send an image.")
        with one_sentence():
            x = to_model_input(image, model.image_size, model.channels)
            return Analysis(model, Picture(x[0], model.encode(x)[0]))

    def bands(image: Image.Image | None) -> dict[str, Any]:
        """The frequency bands of an image and what its spectral tokens do in them.

        Args:
            image: any photo; its middle square is taken.

        Returns:
            {"codes": N codes, "figures": the numbers of each figure of the tab, as columns by name}.
        """
        analysis = analysis_of(image)
        return {"codes": analysis.picture.codes, "figures": tables(dict(analysis.charts()))}

    def band_figure(image: Image.Image | None, figure: str, file_format: str) -> str:
        """One figure of the Frequency bands tab for an image, as a file.

        Args:
            image: any photo; its middle square is taken.
            figure: nested_squares, band_energies, radial_spectra or contributions.
            file_format: png, svg, or csv for the numbers.
        """
        with one_sentence():
            data = chart_bytes(dict(analysis_of(image).charts())[figure], file_format)
        return write_whole(data, f"{figure}.{file_format}", output.GRADIO_CACHE)

    def measure_influence() -> dict[str, Any]:
        """Which radial frequencies move when a token's code is drawn from its position's marginal distribution.

        Returns:
            {"influence": columns token, radial_frequency and influence, an energy; "marginals": where the other
            codes' distribution is from}. Measured by the first call, kept for all others.
        """
        for _ in influence.steps():
            pass
        return tables(influence.charts) | {"marginals": influence.marginals}

    names = list(FIGURES)[:-1]
    with gr.Group(visible=False):
        image, numbers, output = PhotoInput(label="image"), gr.JSON(label="numbers"), gr.File(label="file")
        name = gr.Dropdown(names, value=names[0], label="figure", info=", ".join(names))
        file_format = gr.Dropdown(list(FORMATS), value="png", label="file_format", info=", ".join(FORMATS))
        gr.Button(visible=False).click(bands, image, numbers, api_name="bands", **TOKENIZER)
        gr.Button(visible=False).click(
            band_figure, [image, name, file_format], output, api_name="band_figure", **TOKENIZER
        )  # fmt: skip
    gr.api(measure_influence, api_name="influence", concurrency_id="influence", concurrency_limit=1)
