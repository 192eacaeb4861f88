"""From raw pages to batches of tokens.

`pages` reads archives, `extract`, `language`, `filters` and `dedup` decide what stays, `documents` keeps it as parquet,
`shards` holds tokens in Megatron's form, `order`, `pack` and `blend` say which tokens a training step sees.
`stages` joins them into what a recipe runs. `shards`, `order`, `pack` and `blend` need numpy alone.
"""
