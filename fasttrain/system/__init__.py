"""What has nothing to do with images or learning: command lines, errors, durable files, threads, cores, memory."""
