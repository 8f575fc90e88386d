"""Files written whole or not at all, run folders that resume, safe reading."""

from coterie.artifacts.files import (
    FORMAT,
    disk_errors,
    hash_json,
    hash_text,
    hub_folder,
    sha256_of,
    whole_file,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from coterie.artifacts.reading import (
    open_regular,
    parse_json,
    parse_yaml,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
)
from coterie.artifacts.runs import JsonCache, RunFolder, check_output, environment_record, read_run_record, run_folder
from coterie.artifacts.tensors import MAX_TENSOR_FILE, Claim, read_floats, read_tensors, tensor_claims

__all__ = [
    "FORMAT",
    "MAX_TENSOR_FILE",
    "Claim",
    "JsonCache",
    "RunFolder",
    "check_output",
    "disk_errors",
    "environment_record",
    "hash_json",
    "hash_text",
    "hub_folder",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "read_floats",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_run_record",
    "read_tensors",
    "read_text",
    "run_folder",
    "sha256_of",
    "tensor_claims",
    "whole_file",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]
