"""The paper's tables, run again and written beside the paper's figures."""
