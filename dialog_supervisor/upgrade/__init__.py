"""Going on as another version: dialogd executes itself anew, and hands itself everything that it holds."""
