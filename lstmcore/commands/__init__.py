"""The commands, a file each: its HELP and EXAMPLE, `options` that add its arguments, and `run`.

`lstmcore.cli` has the table of them and runs one; what several of them share is in `terminal`.
"""
