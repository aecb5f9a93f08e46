"""From prompts to images: sampling, the decoding loop, reranking, super-resolution, and the pipeline of all of them."""
