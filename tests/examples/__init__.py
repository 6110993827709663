"""The examples, run as their READMEs say, and in-process against scripted calls."""
