"""One typed object per command: it is the flag list, the YAML schema and the record in `run.yaml`.

Nothing here imports torch, so that the command line can show its help at once. A description stands in one place,
beside its field. `groups` are shared between commands; their fields become plain flags, so names are unique over all
groups of a command. `reading` turns flags and YAML into these objects.
"""
