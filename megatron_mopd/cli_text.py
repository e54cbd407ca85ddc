"""The help texts of the `mopd` command."""

MERGE = """\
Merge the weights of several checkpoints into one Hugging Face folder, as CONFIG says: average, task_arithmetic,
ties, dare, dare_ties or sce. Tensors are streamed in slices: the memory is that of a slice, not of a model.

Everything is checked first. The folder appears when it is complete; called again, there is nothing to do.
"""

MERGE_EPILOG = """\
examples:
  mopd merge configs/tiny/param_merge.yaml
  mopd merge configs/tiny/param_merge.yaml scaling=0.5 out=runs/tiny/merged/lambda_0.5
  mopd merge configs/tiny/param_merge.yaml method=ties density=0.3 out=runs/tiny/merged/ties
"""
