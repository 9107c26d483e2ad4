"""Ways to break a good stream, and what `seekr` must say about each.

A case changes the YAML's values or the files beside it. Its fragments are the field or file, what was
found, and what is allowed or to be done. `test_bad_input` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Gemma2Config

from seekr.models import byte_tokenizer, save_model, tiny_llama
from tests.pipelines.streams import task_rows, write_rows

Values = dict[str, Any]
Change = Callable[[Values, Path], None]
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {}
GOOD = task_rows("upper", 20)


def case(*fragments: str) -> Callable[[Change], Change]:
    """Register a change to a good stream, and what the message about it must hold."""

    def keep(change: Change) -> Change:
        assert change.__name__ not in CASES
        CASES[change.__name__] = (change, fragments)
        return change

    return keep


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@case("tran", "did you mean 'train'")
def misspelt_section(values: Values, folder: Path) -> None:
    values["tran"] = {"epochs": 2}


@case("method.atention_weight", "did you mean 'attention_weight'")
def misspelt_method_field(values: Values, folder: Path) -> None:
    values["method"]["atention_weight"] = 1


@case("tasks.0.metrc", "did you mean 'metric'")
def misspelt_task_field(values: Values, folder: Path) -> None:
    values["tasks"][0]["metrc"] = "rouge_l"


@case("train.epochs", "integer", "'two'")
def wrong_type(values: Values, folder: Path) -> None:
    values["train"]["epochs"] = "two"


@case("train.workers", "mni: unknown field", "did you mean 'min'")
def misspelt_field_of_a_range(values: Values, folder: Path) -> None:
    values["train"]["workers"] = {"mni": 1, "max": 2}


@case("train.batch_size", "greater than or equal to 1", "0")
def batch_of_nothing(values: Values, folder: Path) -> None:
    values["train"]["batch_size"] = 0


@case("train.learning_rate", "finite")
def learning_rate_that_is_no_number(values: Values, folder: Path) -> None:
    values["train"]["learning_rate"] = float("nan")


@case("model", "missing", "seekr schema")
def missing_section(values: Values, folder: Path) -> None:
    del values["model"]


@case("train.strategy", "'ddp', 'fsdp' or 'deepspeed'", "'megatron'")
def strategy_that_is_not_there(values: Values, folder: Path) -> None:
    values["train"]["strategy"] = "megatron"


@case("tasks.upper.train", "absent.jsonl does not exist")
def missing_file(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = "data/absent.jsonl"


@case("tasks.upper.test", "is empty")
def empty_file(values: Values, folder: Path) -> None:
    (folder / "data/upper/test.jsonl").write_text("")


@case("tasks.upper.train", "train.jsonl:3:", "max_bad_share")
def malformed_line(values: Values, folder: Path) -> None:
    lines = [json.dumps(row) for row in GOOD]
    lines[2] = '{"input": "x", '
    (folder / "data/upper/train.jsonl").write_text("\n".join(lines))


@case("tasks.upper.train", "question", "input")
def missing_columns(values: Values, folder: Path) -> None:
    rows = [{"question": row["input"], "output": row["output"]} for row in GOOD]
    write_rows(folder / "data/upper/train.jsonl", rows)


@case("tasks.upper.train", "promt", "prompt")
def named_column_that_is_not_there(values: Values, folder: Path) -> None:
    rows = [{"prompt": row["input"], "answer": row["output"]} for row in GOOD]
    write_rows(folder / "data/upper/train.jsonl", rows)
    values["tasks"][0]["columns"] = {"input": "promt", "output": "answer"}


@case("tasks.upper.train", "train.jsonl:21:", "empty")
def empty_answer(values: Values, folder: Path) -> None:
    write_rows(folder / "data/upper/train.jsonl", [*GOOD, {"input": "x", "output": ""}])


@case("tasks.upper.train", "no usable row")
def no_good_row_at_all(values: Values, folder: Path) -> None:
    write_rows(folder / "data/upper/train.jsonl", [{"input": "x", "output": ""}])


@case("tasks: the task name 'upper' occurs twice; give each its own")
def duplicate_task(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = "upper"


@case("tasks.0.name", "'../upper'")
def task_name_with_separators(values: Values, folder: Path) -> None:
    values["tasks"][0]["name"] = "../upper"


@case("'all' is reserved")
def reserved_task_name(values: Values, folder: Path) -> None:
    values["tasks"][0]["name"] = "all"


@case("tasks", "at least 1")
def no_tasks(values: Values, folder: Path) -> None:
    values["tasks"] = []


@case("method.layer_budget is 3", "2 layers", "1..2")
def layer_budget_above_the_model(values: Values, folder: Path) -> None:
    values["method"]["layer_budget"] = 3


@case("method.head_budget is 9", "8 heads", "1..8")
def head_budget_above_the_model(values: Values, folder: Path) -> None:
    values["method"] |= {"layer_budget": 2, "head_budget": 9}


@case("method.query_budget", "greater than or equal to 1")
def query_budget_of_nothing(values: Values, folder: Path) -> None:
    values["method"]["query_budget"] = 0


@case("replay.ratio", "greater than 0")
def ratio_zero(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": 0}


@case("replay.ratio", "less than or equal to 1", "1.5")
def ratio_above_one(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": 1.5}


@case("replay", "ratio and rows are both set")
def ratio_and_rows(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": 0.1, "rows": 5}


@case("task upper", "0.001 of 40 rows rounds to 0", "0.0125")
def replay_set_of_nothing(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": 0.001}


@case("task upper", "41", "40")
def more_replay_rows_than_there_are(values: Values, folder: Path) -> None:
    values["replay"] = {"rows": 41}


@case("end-of-sequence")
def tokenizer_without_eos(values: Values, folder: Path) -> None:
    path = folder / "model/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token"] = None
    path.write_text(json.dumps(settings))


@case("model.path", "nowhere", "is not a folder")
def model_that_does_not_exist(values: Values, folder: Path) -> None:
    values["model"]["path"] = "nowhere"


@case("model.path", "safetensors", "pickled")
def pickled_weights(values: Values, folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")


@case("model.path", "config.json")
def model_without_config(values: Values, folder: Path) -> None:
    (folder / "model/config.json").unlink()


@case("tokenizer", "vocabulary", "0..99")
def vocabulary_mismatch(values: Values, folder: Path) -> None:
    save_model(tiny_llama(vocab_size=100, hidden=32), byte_tokenizer(), folder / "model")


@case("task upper", "max_length 48", "template")
def template_longer_than_a_row(values: Values, folder: Path) -> None:
    values["tasks"][0]["template"] = "x" * 60 + "{input}"


@case("exactly one")
def template_without_input(values: Values, folder: Path) -> None:
    values["tasks"][0]["template"] = "Answer: "


@case("unknown placeholder {text}")
def template_with_another_hole(values: Values, folder: Path) -> None:
    values["tasks"][0]["template"] = "{text} {input}"


@case("max_length is 4096", "64 positions")
def longer_than_the_model(values: Values, folder: Path) -> None:
    values["data"]["max_length"] = 4096


@case("storage", "not-a-folder")
def storage_that_is_a_file(values: Values, folder: Path) -> None:
    (folder / "not-a-folder").write_text("")
    values["storage"] = str(folder / "not-a-folder" / "store")


@case("train: a section with", "batch_size", "found None")
def a_section_without_fields(values: Values, folder: Path) -> None:
    values["train"] = None


@case("method: a section such as {name: derpp} is needed; found 'derpp'")
def a_method_that_is_only_its_name(values: Values, folder: Path) -> None:
    values["method"] = "derpp"


@case("method.name", "found 'sekr'", "did you mean 'seekr'?", "derpp")
def a_misspelt_method(values: Values, folder: Path) -> None:
    values["method"]["name"] = "sekr"


@case("method.name", "Allowed here: seqft")
def a_method_without_a_name(values: Values, folder: Path) -> None:
    del values["method"]["name"]


@case("method.head_budget: unknown field; it belongs to method seekr: remove it", "replay_weight")
def a_field_of_another_method(values: Values, folder: Path) -> None:
    values["method"] = {"name": "replay", "head_budget": 2}


@case("train.lora is null", "olora", "set train.lora.rank")
def adapters_kept_apart_without_adapters(values: Values, folder: Path) -> None:
    values["method"] = {"name": "olora"}


@case("train.lora is set", "ewc", "train.lora to null")
def weights_held_that_are_frozen_anyway(values: Values, folder: Path) -> None:
    values["method"] = {"name": "ewc"}
    values["train"]["lora"] = {"rank": 2}


@case("train.strategy is deepspeed", "ewc", "choose fsdp or ddp")
def a_penalty_where_gradients_are_out_of_reach(values: Values, folder: Path) -> None:
    values["method"] = {"name": "ewc"}
    values["train"]["strategy"] = "deepspeed"


@case("train.strategy is deepspeed", "recadam", "choose fsdp or ddp")
def a_pull_where_weights_are_out_of_reach(values: Values, folder: Path) -> None:
    values["method"] = {"name": "recadam", "pull_weight": 10}
    values["train"]["strategy"] = "deepspeed"


@case("train.learning_rate is 0.001", "method.pull_weight 1001", "at most 1: lower one of them")
def a_pull_beyond_where_it_pulls_to(values: Values, folder: Path) -> None:
    values["method"] = {"name": "recadam", "pull_weight": 1001}


@case("train.pack_tokens is 64", "lwf", "null is needed")
def packed_rows_that_have_targets(values: Values, folder: Path) -> None:
    values["method"] = {"name": "lwf"}
    values["train"]["pack_tokens"] = 64


@case("data.columns.inptu: unknown field; did you mean 'input'?", "output")
def a_misspelt_field_far_down(values: Values, folder: Path) -> None:
    values["data"]["columns"] = {"inptu": "question"}


@case("train.zzz: unknown field; Allowed here:", "learning_rate")
def a_field_like_no_other(values: Values, folder: Path) -> None:
    values["train"]["zzz"] = 1


@case("train.epochs: a number is needed", "booleans", "found True")
def a_boolean_for_a_number(values: Values, folder: Path) -> None:
    values["train"]["epochs"] = True


@case("tasks.1.name: must be text", "quotes", "found 7")
def a_name_that_yaml_reads_as_a_number(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = 7


@case("tasks: must be a list", "found 'upper'")
def tasks_that_are_no_list(values: Values, folder: Path) -> None:
    values["tasks"] = "upper"


@case("'upper--2'", "'--'")
def a_task_name_like_that_of_a_stage(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = "upper--2"


@case("'UPPER' occurs twice")
def names_that_differ_in_case_only(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = "UPPER"


@case("tasks.0.train: must not be empty")
def an_empty_path(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = ""


@case("replay", "ratio and rows are both null")
def neither_ratio_nor_rows(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": None}


@case("learning_rate", "finite", "inf")
def a_learning_rate_without_bound(values: Values, folder: Path) -> None:
    values["train"]["learning_rate"] = float("inf")


@case("attention_weight", "inf")
def a_loss_weight_without_bound(values: Values, folder: Path) -> None:
    values["method"]["attention_weight"] = float("inf")


@case("tasks.upper.test", "data/upper/notes holds no data files", ".jsonl")
def a_folder_without_data(values: Values, folder: Path) -> None:
    (folder / "data/upper/notes").mkdir()
    values["tasks"][0]["test"] = "data/upper/notes"


@case("tasks.upper.train", "'.csv'", "Allowed are .jsonl")
def a_layout_that_is_not_read(values: Values, folder: Path) -> None:
    (folder / "data/upper/rows.csv").write_text("input,output\na,b\n")
    values["tasks"][0]["train"] = "data/upper/rows.csv"


@case("tasks.upper.train", "part-*.jsonl does not exist")
def a_glob_that_matches_nothing(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = "data/upper/part-*.jsonl"


@case("tasks.upper.train", "gopher://host/rows.jsonl cannot be opened", "Allowed are")
def a_source_of_an_unknown_kind(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = "gopher://host/rows.jsonl"


@case("tasks.upper.train", "rows.json is malformed JSON", "line 1 column")
def half_a_json_document(values: Values, folder: Path) -> None:
    (folder / "data/upper/rows.json").write_text('[{"input": "a", "output": "b"}, {"inp')
    values["tasks"][0]["train"] = "data/upper/rows.json"


@case("tasks.upper.test", "test.jsonl:1: malformed JSON", "tasks.upper.train", "does not exist")
def both_parts_of_a_task(values: Values, folder: Path) -> None:
    (folder / "data/upper/test.jsonl").write_text("no json\n")
    (folder / "data/upper/train.jsonl").unlink()


@case("2 bad rows of 42 (4.76%)", "allowed are 2.00%", "train.jsonl:41: ", "train.jsonl:42: ")
def more_bad_rows_than_allowed(values: Values, folder: Path) -> None:
    values["data"]["max_bad_share"] = 0.02
    with (folder / "data/upper/train.jsonl").open("a") as file:
        file.write('{"input": 1, "output": "a"}\n{"input": "a"\n')


@case("tasks.upper.train", "train.jsonl:1 has no definition", "columns.definition")
def a_template_that_no_row_can_fill(values: Values, folder: Path) -> None:
    values["data"]["template"] = "{definition} {input}"


@case("model.path", "lacks 1 of 2 weight files", "model-00002-of-00002.safetensors")
def a_model_without_its_second_shard(values: Values, folder: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    (folder / "model/model.safetensors").rename(folder / "model" / shard)
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))


@case("model.path", "model.safetensors has 36 bytes", "git lfs pull")
def a_git_lfs_pointer_for_weights(values: Values, folder: Path) -> None:
    (folder / "model/model.safetensors").write_text("version https://git-lfs.github.com/1")


@case("model.path", "not a whole safetensors file", "download it again")
def half_of_the_weights(values: Values, folder: Path) -> None:
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@case("model.path", "no weights", "adapter")
def an_adapter_without_its_model(values: Values, folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/adapter_model.safetensors")


@case("config.json wants its own Python code", "model.trust_remote_code is false")
def a_model_with_code_of_its_own(values: Values, folder: Path) -> None:
    edit_json(folder / "model/config.json", auto_map={"AutoConfig": "code.Config"})
    (folder / "model/code.py").write_text("raise SystemExit('this code was run')")


@case("tokenizer_config.json wants its own Python code", "model.trust_remote_code is false")
def a_tokenizer_with_code_of_its_own(values: Values, folder: Path) -> None:
    edit_json(folder / "model/tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})


@case("config.json cannot be used")
def a_broken_config(values: Values, folder: Path) -> None:
    (folder / "model/config.json").write_text('{"model_type": ')


@case("config.json cannot be used", "llamma")
def a_kind_of_model_that_nobody_knows(values: Values, folder: Path) -> None:
    edit_json(folder / "model/config.json", model_type="llamma")


@case("model.path", "tokenizer cannot be used")
def a_broken_tokenizer(values: Values, folder: Path) -> None:
    (folder / "model/tokenizer.json").write_text('{"version": "1.0"')


@case("model.path", "no tokenizer_config.json", "copy its files there")
def a_model_without_a_tokenizer(values: Values, folder: Path) -> None:
    (folder / "model/tokenizer_config.json").unlink()


@case("'gemma2' cannot be probed", "attn_logit_softcapping", "derpp")
def a_soft_capped_model_for_seekr(values: Values, folder: Path) -> None:
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    config.save_pretrained(folder / "model")


@case("storage", "store/train/upper/0123456789abcdef0123/record.json is a file", "choose another")
def a_file_for_storage(values: Values, folder: Path) -> None:
    values["storage"] += "/train/upper/0123456789abcdef0123/record.json"


@case("storage", "bucket/store: cannot be written", "seekr-probe", "endpoint_override")
def a_bucket_that_does_not_answer(values: Values, folder: Path) -> None:
    options = "scheme=http&endpoint_override=127.0.0.1:9&region=x"
    values["storage"] = f"s3://key:hidden-word@bucket/store?{options}"


@case("storage", "unknown scheme", "s3://", "gs://")
def a_storage_that_is_not_supported(values: Values, folder: Path) -> None:
    values["storage"] = "https://host/store"


@case("ray.num_cpu: unknown field; did you mean 'num_cpus'?")
def a_misspelt_execution_field(values: Values, folder: Path) -> None:
    values["ray"] = {"num_cpu": 2}


@case("teach.logits_kept: must be null", "method derpp", "whole logits", "found 64")
def a_distance_of_logits_that_are_not_kept_whole(values: Values, folder: Path) -> None:
    values["method"] = {"name": "derpp", "logit_loss": "mse"}


@case("teach.logits_kept", "greater than or equal to 1", "found 0")
def no_logit_kept(values: Values, folder: Path) -> None:
    values["teach"] = {"logits_kept": 0}


@case("teach.bits", "16 or 32", "found 8")
def bits_that_are_not_there(values: Values, folder: Path) -> None:
    values["teach"] = {"bits": 8}


@case("teach.dtype: unknown field", "bits", "logits_kept")
def a_setting_of_earlier_versions(values: Values, folder: Path) -> None:
    values["teach"] = {"dtype": "float16"}


@case("train.offload is 'optimizer'", "'none' and 'all' are allowed")
def a_part_that_fsdp_cannot_offload(values: Values, folder: Path) -> None:
    values["train"] |= {"strategy": "fsdp", "offload": "optimizer"}


@case("train.offload is 'all' with train.zero_stage 2", "zero_stage 3 is needed")
def parameters_offloaded_that_zero_2_keeps(values: Values, folder: Path) -> None:
    values["train"] |= {"strategy": "deepspeed", "zero_stage": 2, "offload": "all"}


@case("train.optimizer is adamw_8bit and train.strategy fsdp", "use strategy ddp")
def eight_bit_state_for_shards(values: Values, folder: Path) -> None:
    values["train"] |= {"strategy": "fsdp", "optimizer": "adamw_8bit"}


@case("train.lora.targets names 'qq_proj'", "q_proj", "or leave targets null for all")
def adapters_for_layers_the_model_lacks(values: Values, folder: Path) -> None:
    values["train"]["lora"] = {"targets": ["q_proj", "qq_proj"]}


@case("train.workers", "min is 3 and max 2")
def fewer_workers_at_most_than_at_least(values: Values, folder: Path) -> None:
    values["train"]["workers"] = {"min": 3, "max": 2}


@case("train.offload is 'optimizer'", "train.lora.targets names 'x'", "task upper: max_length")
def what_workers_would_find_and_more(values: Values, folder: Path) -> None:
    values["train"] |= {"strategy": "fsdp", "offload": "optimizer", "lora": {"targets": ["x"]}}
    values["data"]["max_length"] = 4096
