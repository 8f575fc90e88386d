"""Files written whole or not at all, run folders that resume, safe reading."""

from coterie.artifacts.files import (
    FORMAT,
    append_text,
    as_path,
    disk_errors,
    hash_json,
    hash_json_list,
    hash_text,
    is_full,
    sha256_of,
    whole_file,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from coterie.artifacts.folders import check_copy, check_tree, new_folder, real_folder, replace_folder
from coterie.artifacts.hub import hub_errors, hub_folder, may_be_on_hub, publish
from coterie.artifacts.kinds import check_kind
from coterie.artifacts.locks import locked
from coterie.artifacts.machine import environment_record, free_memory
from coterie.artifacts.outputs import check_file, inputs_of, is_stream, write_answers
from coterie.artifacts.reading import open_regular, parse_json, parse_yaml, read_json, read_jsonl, read_lines, read_text
from coterie.artifacts.runs import check_output, partial_folder, read_run_record, run_folder
from coterie.artifacts.stages import STAGES_FILE, JsonCache, RunFolder, read_stages
from coterie.artifacts.tensors import (
    MAX_TENSOR_FILE,
    Claim,
    fill_matrix,
    new_matrix,
    read_floats,
    read_tensors,
    tensor_claims,
)
