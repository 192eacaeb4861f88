"""A recipe is a graph of stages; this room checks it, runs it, resumes it and reports what came out.

`recipe` reads and checks a graph; `stages` is the table of what can stand in one; `run` works through it, one process a
stage (`worker`); `manifest` says what a finished stage was made of; `report` makes one page of it all.
"""
