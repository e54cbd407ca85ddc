"""`mopd reproduce`: a comparison of methods, with seeds and intervals, from one file.

The file names a base, its teachers and the methods. Each is a run, a sample or a merge of its own, a node of a graph;
a node is made once and kept for as long as nothing that it depends on changes. Nothing here imports torch before
there is something to run.
"""
