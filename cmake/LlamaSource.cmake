# PLB_LLAMA_SOURCE: llama.cpp's tree, and PLB_LLAMA_BUILD: its build number ("b11549").
# In this order: -DPLB_LLAMA_CPP_DIR, vendor/llama.cpp (a submodule, or what our sdist ships),
# else the archive that vendor/llama.cpp.lock pins, unpacked there with vendor/patches applied.
set(vendored "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp")
set(stamp "${vendored}/.pyllamabatch-lock")

if (PLB_LLAMA_CPP_DIR)
    set(PLB_LLAMA_SOURCE "${PLB_LLAMA_CPP_DIR}")
else()
    set(PLB_LLAMA_SOURCE "${vendored}")
    if (EXISTS "${stamp}" OR NOT EXISTS "${vendored}/CMakeLists.txt")
        execute_process(
            COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/vendor/unpack.py"
            RESULT_VARIABLE failed ERROR_VARIABLE reason)
        if (failed)
            message(FATAL_ERROR "${reason}")
        endif()
    endif()
endif()

if (NOT EXISTS "${PLB_LLAMA_SOURCE}/include/llama.h")
    message(FATAL_ERROR "pyllamabatch: ${PLB_LLAMA_SOURCE} is not a llama.cpp tree "
                        "(no include/llama.h); check -DPLB_LLAMA_CPP_DIR.")
endif()

if (NOT EXISTS "${PLB_LLAMA_SOURCE}/.pyllamabatch-lock")  # not ours to patch
    execute_process(
        COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/vendor/unpack.py"
                --lacking "${PLB_LLAMA_SOURCE}"
        OUTPUT_VARIABLE lacking OUTPUT_STRIP_TRAILING_WHITESPACE)
    if (lacking)
        string(REPLACE "\n" ", " lacking "${lacking}")
        message(WARNING "pyllamabatch: ${PLB_LLAMA_SOURCE} lacks these patches of "
                        "vendor/patches: ${lacking}. Each says in its head what goes wrong.")
    endif()
endif()

file(GLOB patches CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/vendor/patches/*.patch")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
             "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp.lock" ${patches})
# Upstream asks git for its commit: it must not find our repository around its tree, whose
# every commit would rebuild it.
cmake_path(GET PLB_LLAMA_SOURCE PARENT_PATH ceiling)
set(ENV{GIT_CEILING_DIRECTORIES} "${ceiling}")
if (EXISTS "${PLB_LLAMA_SOURCE}/.pyllamabatch-lock")
    file(STRINGS "${PLB_LLAMA_SOURCE}/.pyllamabatch-lock" lines)
    list(GET lines 1 LLAMA_BUILD_NUMBER)
    set(LLAMA_BUILD_COMMIT "b${LLAMA_BUILD_NUMBER}")
    set(PLB_LLAMA_BUILD "b${LLAMA_BUILD_NUMBER}")
else()
    set(PLB_LLAMA_BUILD "own checkout")
endif()
message(STATUS "llama.cpp: ${PLB_LLAMA_SOURCE} (${PLB_LLAMA_BUILD})")
