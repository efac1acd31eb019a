"""The rows of the feature table: for each feature the check that measures it, and the tests that prove it for our families.

A cell of ours says yes only where the check passed (if there is one) and a test of `tests` covers the family: one whose
parameters name it, one in the family's own folder, or one that does not depend on the family.
"""

from dataclasses import dataclass, field

HUB, PEFT = "tests/hub/test_push_and_pull.py::", "tests/integrations/test_peft.py::"
FAULTS, PIPES = "tests/hub/test_faults.py::", "tests/integrations/test_pipelines.py::"
DIST = "tests/distributed/test_training_example.py::"
PADDING, FORWARD = "tests/test_matrix_padding.py::", "tests/test_matrix_forward.py::"
GENERATE, ROLLBACK = "tests/test_matrix_generate.py::", "tests/test_matrix_rollback.py::"
PACKING, TRAINING = "tests/test_matrix_packing.py::", "tests/test_matrix_training.py::"
COMPILE, PACKED = "tests/test_matrix_compile.py::", "tests/integrations/test_packed_training.py::"
EVALUATION, EXPORT = "tests/integrations/test_evaluation.py::", "tests/integrations/test_export.py::"
SEA_MODELS = "tests/sea/test_sea_models.py::"
CHECKED = "tests/test_feature_checks.py::test_check"

NO_DECODER = "an encoder does not generate"
NO_PREFIX = "it writes keys and values into the cache, and a state has no place for them: refused with the reason"


@dataclass(frozen=True)
class Row:
    """One feature.

    Args:
        title: what the row says; empty for the title of the check.
        check: name of the check in `benchmarks.feature_checks` that measures it on every model, if there is one.
        tests: `file::test` of the tests that prove it, the first that covers a family is linked.
        no: column -> why it is not there.
        others: what Transformers' own models have, where no check measures it; empty: not measured.
        by_tests_alone: columns whose model in the check is not the one that the feature is for.
    """

    title: str = ""
    check: str = ""
    tests: tuple[str, ...] = ()
    no: dict[str, str] = field(default_factory=dict)
    others: str = ""
    by_tests_alone: tuple[str, ...] = ()


ENCODER = {"DANet encoder": NO_DECODER}
ONE_TEXT = {"DANet encoder": "one text a row"}
GROWS = {"SEA": "any earlier key may be chosen, so keys and values are kept; the estimator's state is fixed"}
NO_MASKED_CAUSAL = dict.fromkeys(
    ("LEAP", "Fastformer", "DANet"), "a causal model; the DANet encoder and SEA over BERT have it"
)

GROUPS: dict[str, list[Row]] = {
    "The 31 checks of a causal language model": [
        Row(
            check="forward",
            tests=(
                FORWARD + "test_outputs_as_a_tuple",
                SEA_MODELS + "test_fresh_models_draw_the_initial_values_of_the_design",
            ),
        ),
        Row(check="bfloat16", tests=(TRAINING + "test_half_precision_is_finite_and_close", CHECKED)),
        Row(check="float16", tests=(TRAINING + "test_half_precision_is_finite_and_close", CHECKED)),
        Row(
            check="right_padding",
            tests=(PADDING + "test_outputs_and_gradients",),
        ),
        Row(
            check="left_padding",
            tests=(PADDING + "test_outputs_and_gradients",),
        ),
        Row(check="right_padded_prefill", tests=(PADDING + "test_state_left_behind", CHECKED)),
        Row(
            check="ragged_generation",
            tests=(GENERATE + "test_left_padded_batch",),
        ),
        Row(
            check="one_token_a_step",
            tests=(FORWARD + "test_calls_with_a_state_are_one_call",),
        ),
        Row(check="two_chunks", tests=(FORWARD + "test_calls_with_a_state_are_one_call", CHECKED)),
        Row(check="fixed_state", tests=(GENERATE + "test_state_does_not_grow",), no=GROWS),
        Row(
            check="greedy",
            tests=(GENERATE + "test_state_or_not_gives_the_same_text",),
        ),
        Row(
            check="beam",
            tests=(GENERATE + "test_state_or_not_gives_the_same_text",),
        ),
        Row(check="several_returns", tests=(GENERATE + "test_state_or_not_gives_the_same_text", CHECKED)),
        Row(check="prefill_chunks", tests=(GENERATE + "test_prefill_in_chunks", CHECKED)),
        Row(check="static_cache", tests=(GENERATE + "test_cache_implementations", CHECKED)),
        Row(check="assisted", tests=(ROLLBACK + "test_assisted_decoding_is_greedy_decoding", CHECKED)),
        Row(check="packing_by_positions", tests=(PACKING + "test_packed_documents",), no=ONE_TEXT),
        Row(check="packing_by_offsets", tests=(PACKING + "test_packed_documents",), no=ONE_TEXT),
        Row(
            check="safetensors",
            tests=(TRAINING + "test_saved_and_loaded", SEA_MODELS + "test_saved_models_load_through_the_auto_classes"),
        ),
        Row(check="trainer", tests=(TRAINING + "test_trainer_lowers_the_loss", CHECKED)),
        Row(
            check="lora_all_linear",
            tests=(TRAINING + "test_lora_on_all_linear_layers", CHECKED),
            no={"SEA": "the estimator's row decoder chooses keys, and learns from the distillation losses alone"},
        ),
        Row(check="lora_default", tests=(PEFT + "test_default_targets", CHECKED)),
        Row(
            check="gradient_checkpointing",
            tests=(
                TRAINING + "test_checkpointing_gives_the_same_gradients",
                CHECKED,
            ),
        ),
        Row(check="compiled_prefill", tests=(COMPILE + "test_forward_is_one_graph", CHECKED)),
        Row(check="compiled_decode", tests=(COMPILE + "test_decoding_with_a_static_cache_is_one_graph", CHECKED)),
        Row(check="exported_fixed", tests=(COMPILE + "test_export_with_fixed_shapes", CHECKED)),
        Row(
            check="exported_dynamic",
            tests=(COMPILE + "test_export_with_dynamic_batch_and_length", CHECKED),
            no={"SEA": "torch.export finds a constraint on the length, by which the grid of cells is laid out"},
        ),
        Row(check="inputs_embeds", tests=(GENERATE + "test_inputs_embeds", CHECKED)),
        Row(check="logits_to_keep", tests=(FORWARD + "test_logits_to_keep", CHECKED)),
        Row(
            check="output_attentions",
            tests=(
                "tests/test_matrix_explain.py::test_one_map_a_layer_whose_rows_sum_to_one",
                SEA_MODELS + "test_attention_estimate_and_cells_can_be_looked_at",
                CHECKED,
            ),
        ),
        Row(check="other_heads", tests=(FORWARD + "test_auto_classes_and_name_tables", CHECKED)),
    ],
    "Hub": [
        Row(
            '`push_to_hub` and `from_pretrained("user/repo")`, every head, with the tokenizer',
            tests=(HUB + "test_every_head_comes_back_with_its_tokenizer",),
            others="yes",
        ),
        Row("Branch, tag, commit as `revision`", tests=(HUB + "test_branch_tag_and_commit",), others="yes"),
        Row("`create_pr`", tests=(HUB + "test_pull_request",), others="yes"),
        Row("Private repositories", tests=(HUB + "test_private",), others="yes"),
        Row("Pushing an unchanged model makes no commit", tests=(HUB + "test_pushing_the_same_again_makes_no_commit",)),
        Row(check="sharded", tests=(HUB + "test_several_shards", CHECKED)),
        Row(
            "A wrong token, a missing repository: an error that says so",
            tests=(HUB + "test_a_wrong_token_is_refused", HUB + "test_a_missing_repository_is_named"),
            others="yes",
        ),
        Row("`Trainer(push_to_hub=True)`", tests=(HUB + "test_trainer_pushes_each_save_with_its_code",), others="yes"),
        Row(
            "Loads every head where the package is missing (`trust_remote_code`), same tokens, saves again",
            tests=("tests/hub/test_without_package.py::test_loads_computes_and_saves_again",),
            others="not needed",
        ),
        Row(
            "With the package no remote code is run",
            tests=(FAULTS + "TestUnwantedCode::test_installed_package_wins",),
            others="yes",
        ),
        Row(
            "Model card from the run's own data",
            tests=("tests/hub/test_cards.py::test_figures_of_the_run",),
            others="Trainer's, without figures of the model",
        ),
        Row(
            "Trainer callback for the card",
            tests=("tests/hub/test_cards.py::test_callback_and_push",),
            others="Trainer's own card",
        ),
    ],
    "PEFT and quantization": [
        Row(
            "LoRA trains, saves, loads",
            tests=(
                PEFT + "test_train_save_load_merge",
                "tests/sea/test_sea_distillation.py::test_lora_trains_adapters_and_sea_and_merges",
            ),
        ),
        Row(check="lora_merged", tests=(PEFT + "test_train_save_load_merge", CHECKED)),
        Row("Several adapters on one model", tests=(PEFT + "test_several_adapters",)),
        Row(check="int8", tests=(PEFT + "TestTorchao::test_int8_weights", CHECKED)),
        Row(check="prompt_tuning", tests=(PEFT + "test_prompt_tuning", CHECKED)),
        Row(
            check="prefix_tuning",
            tests=(CHECKED,),
            no=dict.fromkeys(("LEAP", "Fastformer", "DANet", "SEA"), NO_PREFIX),
        ),
    ],
    "Pipelines": [
        Row(check="pipeline_generation", tests=(PIPES + "test_text_generation", CHECKED)),
        Row(
            check="pipeline_fill_mask", tests=(PIPES + "test_fill_mask",), no=NO_MASKED_CAUSAL, by_tests_alone=("SEA",)
        ),
        Row(check="pipeline_text_classes", tests=(PIPES + "test_text_classification", CHECKED)),
        Row(check="pipeline_token_classes", tests=(PIPES + "test_token_classification", CHECKED)),
        Row(
            "Pipeline question-answering (`hf_linear_attn.pipelines`; `pipeline()` refuses the task)",
            tests=("tests/integrations/test_question_answering.py::test_answers_are_those_of_the_logits",),
            others="no",
        ),
        Row(check="pipeline_features", tests=(PIPES + "test_feature_extraction", CHECKED)),
    ],
    "Distributed training": [
        Row(
            "`accelerate launch`, DDP: two processes give one process's losses",
            tests=(DIST + "test_losses_are_those_of_one_process",),
        ),
        Row(
            "FSDP2: every parameter is a DTensor, same losses",
            tests=(DIST + "test_fsdp2_really_shards",),
        ),
        Row(
            "DDP, FSDP2, DeepSpeed ZeRO-2 configurations on two GPUs",
            tests=(DIST + "test_configurations_on_two_gpus",),
            no={
                "SEA": "DDP and ZeRO-2 pass there; FSDP2 met a fault of accelerate's, avoided since, and has run on CPUs alone"
            },
        ),
        Row(
            "Resumes on another number of processes",
            tests=(DIST + "test_resumes_on_another_number_of_processes",),
        ),
        Row(
            check="whole_blocks",
            tests=(
                "tests/distributed/test_plans.py::test_every_layer_is_a_block",
                "tests/distributed/test_plans.py::test_sea_keeps_its_hosts_blocks_whole",
            ),
        ),
    ],
    "Packing": [
        Row(
            "`DataCollatorWithFlattening`: packed equals separate, forward and backward",
            tests=(PACKED + "test_flattening_collator",),
            no=ONE_TEXT,
        ),
        Row("TRL `SFTConfig(packing=True)`", tests=(PACKED + "test_trl_packing",), no=ONE_TEXT),
        Row(
            "TRL `SFTTrainer`: the model's own loss, every part of the model trained",
            tests=("tests/integrations/test_trl.py::test_sft_trains_the_models_own_loss",),
            no=ENCODER,
        ),
    ],
    "Evaluation": [
        Row(
            "`lm-eval` on a saved checkpoint, with a local task",
            tests=(EVALUATION + "test_lm_eval_on_a_folder",),
            no=ENCODER,
        ),
        Row(
            "Metrics of our own through `evaluate`",
            tests=(EVALUATION + "TestOurMetrics::test_bits_per_byte", EVALUATION + "TestOurMetrics::test_recall_at_k"),
            others="usable",
        ),
        Row("scikit-learn in `compute_metrics`", tests=(EVALUATION + "test_scikit_learn_in_trainer",), others="yes"),
    ],
    "State tools": [
        Row(
            check="prompt_lookup",
            tests=(
                ROLLBACK + "test_prompt_lookup_is_greedy_decoding",
                CHECKED,
            ),
        ),
        Row(
            "Exact undoing of tokens",
            tests=(ROLLBACK + "test_crop",),
            no=ENCODER,
        ),
        Row(
            check="saved_state",
            tests=("tests/test_matrix_cache_files.py::test_resumes_in_another_process",),
        ),
        Row(
            check="forked_state",
            tests=(GENERATE + "test_forks_are_independent",),
        ),
    ],
    "Export": [
        Row(
            "torch.export of prefill and decode step, dynamic batch and length",
            tests=(EXPORT + "test_prefill_then_steps",),
            no=ENCODER | {"SEA": "its cache grows, and which keys it reads depends on the data"},
        ),
        Row(
            "ONNX decode step: onnxruntime gives the same tokens",
            tests=(EXPORT + "TestOnnx::test_the_same_tokens",),
            no=ENCODER | {"SEA": "its cache grows, and which keys it reads depends on the data"},
        ),
    ],
    "Faults": [
        Row("A truncated or corrupted safetensors file", tests=(FAULTS + "TestDamagedWeights::test_truncated",)),
        Row(
            "A configuration of an unknown family or a newer version",
            tests=(FAULTS + "TestConfigurations::test_another_format",),
        ),
        Row(
            "A full disk: the previous checkpoint survives",
            tests=(FAULTS + "TestFullDisk::test_previous_checkpoint_survives",),
        ),
        Row(
            "A push that breaks: the retry gives one clean commit",
            tests=(FAULTS + "TestBrokenPush::test_retry_gives_one_commit",),
        ),
        Row("A killed rank: the others end with a clear message", tests=(DIST + "test_a_killed_process_ends_the_run",)),
        Row(
            "Weights are read from safetensors alone (`--resume` also reads Trainer's states, which PyTorch opens without running code)",  # noqa: E501
            tests=(FAULTS + "TestPickle::test_never_loaded",),
            others="no (with `use_safetensors=False`)",
        ),
        Row(
            "Remote code never runs without being asked for",
            tests=(FAULTS + "TestUnwantedCode::test_refused_unless_trusted",),
            others="yes",
        ),
    ],
    "Compatibility and command line": [
        Row(
            "Private names of Transformers in one file",
            tests=("tests/integrations/test_private_names.py::test_imports_go_through_compat",),
            others="not needed",
        ),
        Row(
            "`train`, `generate`, `convert`, `distill`, `evaluate`, `explain`, `card`, `bench`: help with an example, `--json`, suggestions",  # noqa: E501
            tests=("tests/cli/test_commands.py::TestAll::test_help_has_an_example_and_json",),
        ),
    ],
}
