"""The two pages a browser opens: a run's report and a cross-evaluation, each one self-contained HTML file."""
