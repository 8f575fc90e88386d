"""Files written whole or not at all, run folders that resume, safe reading."""

from coterie.artifacts.files import (
    FORMAT,
    MAX_TENSOR_FILE,
    disk_errors,
    hash_json,
    hash_text,
    hub_folder,
    read_json,
    read_jsonl,
    read_tensors,
    sha256_of,
    whole_file,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from coterie.artifacts.runs import JsonCache, RunFolder, check_output, environment_record, read_run_record, run_folder

__all__ = [
    "FORMAT",
    "MAX_TENSOR_FILE",
    "JsonCache",
    "RunFolder",
    "check_output",
    "disk_errors",
    "environment_record",
    "hash_json",
    "hash_text",
    "hub_folder",
    "read_json",
    "read_jsonl",
    "read_run_record",
    "read_tensors",
    "run_folder",
    "sha256_of",
    "whole_file",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]
