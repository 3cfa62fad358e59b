"""One rewrite per file; their order is `nascompile.compiler.pipeline.DEFAULT`."""
