"""`disagg bench`: transfers measured beside other libraries in the same run."""
