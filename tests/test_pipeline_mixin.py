"""What diffusers' PipelineTesterMixin and MemoryTesterMixin (tests/pipelines/testing_utils) call, and where we ask it.

They are not in the wheel. Untouched they pass, with `class_labels` as required and batch parameters, and neither
`num_inference_steps` nor `latents`: there are as many steps as tokens, and no noise to start from. Group offloading is
skipped, as the components say that they do not support it, and so is `encode_prompt`, which there is none of.
"""

import ast
from pathlib import Path

import pytest

TESTS = {
    "test_pipeline.py": {
        "test_pipeline_call_signature": "test_signature_and_defaults",
        "test_inference_batch_consistent": "test_an_image_is_the_same_whatever_follows_it",
        "test_inference_batch_single_identical": "test_a_batch_is_its_images_one_by_one",
        "test_dict_tuple_outputs_equivalent": "test_dict_and_tuple_outputs",
        "test_num_images_per_prompt": "test_num_images_per_prompt",
        "test_cfg": "test_scale_one_skips_the_unconditional_rows",
        "test_attention_slicing_forward_pass": "test_attention_slicing_switch_is_harmless",
    },
    "test_pipeline_parts.py": {
        "test_components_function": "test_components",
        "test_half_precision_inference_no_nan": "test_to_dtype",
        "test_to_dtype": "test_to_dtype",
        "test_to_device": "test_to_device",
    },
    "test_pipeline_steps.py": {
        "test_callback_inputs": "test_latents_of_the_last_step_can_be_replaced",
        "test_callback_cfg": "test_guidance_scale_is_read_in_every_step",
    },
    "test_pipeline_loading.py": {
        "test_save_load_local": "test_pickles_where_they_are_asked_for",
        "test_serialization_with_variants": "test_pickles_where_they_are_asked_for",
        "test_loading_with_variants": "test_variants",
        "test_loading_with_incorrect_variants_raises_error": "test_pickles_where_they_are_asked_for",
        "test_save_load_float16": "test_half_precision",
        "test_save_load_optional_components": "test_optional_components_of_the_class_and_of_a_pipeline",
        "test_torch_dtype_dict": "test_dtypes_of_components",
        "test_pipeline_with_accelerator_device_map": "test_a_device_map",
    },
    "inference/test_offloading.py": {
        "test_model_cpu_offload_forward_pass": "test_model_cpu_offload",
        "test_cpu_offload_forward_pass_twice": "test_model_cpu_offload",
        "test_sequential_cpu_offload_forward_pass": "test_sequential_offload",
        "test_sequential_offload_forward_pass_twice": "test_sequential_offload",
        "test_group_offloading_inference_block_level": "test_group_offloading_is_refused",
        "test_group_offloading_inference_leaf_level": "test_group_offloading_is_refused",
        "test_pipeline_level_group_offloading_sanity_checks": "test_group_offloading_is_refused",
        "test_pipeline_level_group_offloading_inference": "test_group_offloading_is_refused",
        "test_layerwise_casting_inference": "test_weights_stored_in_8_bits",
    },
}


@pytest.mark.parametrize("file", TESTS)
def test_the_tests_that_are_named_are_there(file):
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    assert set(TESTS[file].values()) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
