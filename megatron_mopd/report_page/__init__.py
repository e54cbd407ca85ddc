"""`mopd report`: one self-contained HTML page, figures as PNG and PDF, and Markdown, from the folders of runs."""
