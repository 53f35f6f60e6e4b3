"""The pages that show runs: what a run folder holds, drawn and put in words, each page a file that needs no other."""
