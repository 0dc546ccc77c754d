"""Is this environment, bucket and cluster ready to train? Every check is a small function.

`machine` looks at this computer, `store` at where runs are kept, `dataset` at data, `cluster` at
Ray. Each answers with Findings: what was seen, and how to mend what would make training fail.
"""
