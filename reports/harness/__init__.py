"""What all reports share: real inputs, baselines, paired timing, rows, plots and pages."""
