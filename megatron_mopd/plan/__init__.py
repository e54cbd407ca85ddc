"""`mopd plan`: what a run needs before it is queued. Memory, bytes moved, FLOPs, time by ceilings, layouts that fit."""
