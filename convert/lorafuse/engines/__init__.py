"""Where work is done when one process is not enough: engines that run calls in other processes, of this
machine or of a cluster. lorafuse schedules nothing and retries nothing itself."""
