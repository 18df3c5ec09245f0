# gdb reads this file for python -m minilm.kernels.emulator MODULE --debug.
# The threads of a kernel take turns on one core, so gdb sees one thread; these commands show which one it is.
# next and step follow one thread of the kernel, over barriers too. Stop in another thread with a condition:
#     break attention.cu:40 if blockIdx.x == 1 && threadIdx.x == 5
set confirm off
set breakpoint pending on
set print thread-events off
set debuginfod enabled off
set startup-with-shell off
set print frame-arguments presence

define whoami
    printf "block (%u, %u, %u) of ", blockIdx.x, blockIdx.y, blockIdx.z
    printf "(%u, %u, %u), ", gridDim.x, gridDim.y, gridDim.z
    printf "thread (%u, %u, %u) of ", threadIdx.x, threadIdx.y, threadIdx.z
    printf "(%u, %u, %u)\n", blockDim.x, blockDim.y, blockDim.z
end
document whoami
The block and the thread of the kernel in which gdb has stopped.
end

define fibers
    set $first = 0
    while $first < emulator::thread_count
        set $one = &emulator::threads[$first]
        set $last = $first
        while $last + 1 < emulator::thread_count
            set $next = &emulator::threads[$last + 1]
            set $same = $next->place == $one->place && $next->waits_for == $one->waits_for && $next->done == $one->done
            if !$same || $one == emulator::current || $next == emulator::current
                loop_break
            end
            set $last = $last + 1
        end
        printf "threads %d to %d: ", $first, $last
        if $one == emulator::current
            printf "running\n"
        else
            if $one->done
                printf "exited\n"
            else
                if $one->waits_for
                    printf "wait at %s, %s:%d\n", $one->operation, $one->site.file, $one->site.line
                else
                    printf "can continue\n"
                end
            end
        end
        set $first = $last + 1
    end
end
document fibers
The state of every thread of this block, by flattened index: running, waiting and where, can continue, exited.
end
