# Read by gdb for python -m minilm.kernels.emulator ROOM --debug.
# A kernel's threads take turns on one core, so they are not threads to gdb: these commands tell them apart.
# next and step follow one thread, over barriers too. Stop in another one with a condition:
#     break attention.cu:57 if blockIdx.x == 1 && threadIdx.x == 5
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
The block and the thread of the kernel that gdb has stopped in.
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
                    printf "can go on\n"
                end
            end
        end
        set $first = $last + 1
    end
end
document fibers
What every thread of this block does (by its flattened index): runs, waits and where, can go on, has exited.
end
