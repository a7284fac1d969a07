import gradio as gr
import pytest

from spectralar.demo.links import Link, from_query, restore, write_script


@pytest.mark.parametrize(
    ("component", "text", "expected"),
    [
        (gr.Slider(0, 10, 2), "3.5", 3.5),
        (gr.Slider(0, 10, 2), "3", 3),
        (gr.Slider(0, 10, 2), "11", None),
        (gr.Slider(0, 10, 2), "nan", None),
        (gr.Slider(0, 10, 2), "inf", None),
        (gr.Slider(0, 10, 2), "many", None),
        (gr.Number(0, minimum=0, maximum=2**31 - 1), "2147483647", 2147483647),
        (gr.Number(0, minimum=0), "-1", None),
        (gr.Dropdown(["bag", "boot"]), "boot", "boot"),
        (gr.Dropdown(["bag", "boot"]), "<script>", None),
        (gr.Textbox(), "1 2 3", "1 2 3"),
        (gr.Textbox(), "1 " * 5000, None),
    ],
)
def test_only_valid_values_are_taken_from_an_address(component, text, expected):
    assert from_query(component, text) == expected


def test_what_is_missing_or_wrong_is_left_alone():
    links = [Link("a", gr.Slider(0, 10, 2)), Link("b", gr.Slider(0, 10, 2)), Link("c", gr.Textbox())]
    a, b, c = restore(links, {"a": "4", "b": "400"})
    assert a == 4 and b == gr.skip() and c == gr.skip()


def test_script_names_what_it_writes():
    script = write_script(["seed", "class"])
    assert '["seed", "class"]' in script and "replaceState" in script
