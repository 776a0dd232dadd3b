# What a build for another platform adds to CMakeLists.txt, in whose end it runs, where nothing is
# optimised: our own code compiles without a warning, and so do the files that no other build here
# compiles for a Mac.
cmake_language(DEFER CALL add_checks)

function(add_checks)
    set(ours plb)
    get_property(tests DIRECTORY native/tests PROPERTY BUILDSYSTEM_TARGETS)
    file(GLOB metal "${PLB_LLAMA_SOURCE}/ggml/src/ggml-metal/*.cpp")
    file(GLOB fuzzers native/fuzz/*.cpp)
    if (APPLE)
        # Each of our files names the headers that it needs, also of this C++ library.
        set_target_properties(plb PROPERTIES UNITY_BUILD OFF)
        add_library(metal OBJECT ${metal})
        target_include_directories(metal PRIVATE "${PLB_LLAMA_SOURCE}/ggml/src")
        target_link_libraries(metal PRIVATE ggml-base)
        add_library(fuzzers OBJECT ${fuzzers})
        target_compile_options(fuzzers PRIVATE -Wall -Wextra)
        target_include_directories(fuzzers PRIVATE "${PLB_LLAMA_SOURCE}/common"
            "${PLB_LLAMA_SOURCE}/vendor" "${PLB_LLAMA_SOURCE}/src")
        target_link_libraries(fuzzers PRIVATE plb)
        list(APPEND ours fuzzers)
    endif()
    set_property(TARGET ${ours} ${tests} PROPERTY COMPILE_WARNING_AS_ERROR ON)
endfunction()
