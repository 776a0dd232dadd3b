# Files that share headers are compiled together, as upstream's own models are: what is not optimised
# then takes half the time. Apart stay C, and what another file of its library defines, too.
file(GLOB core "${PLB_LLAMA_SOURCE}/src/*.cpp")
set_source_files_properties(${core} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION OFF)

set_target_properties(ggml-base ggml-cpu PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
set(ggml "${PLB_LLAMA_SOURCE}/ggml/src")
file(GLOB_RECURSE apart "${ggml}/*.c" "${ggml}/ggml-cpu/arch/*.cpp"
     "${ggml}/ggml-cpu/llamafile/*.cpp")
set_source_files_properties(${apart} TARGET_DIRECTORY ggml-base
    PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

set_target_properties(plb PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
foreach(folder step sampling device guard)
    file(GLOB sources native/${folder}/*.cpp)
    set_source_files_properties(${sources} TARGET_DIRECTORY plb PROPERTIES UNITY_GROUP ${folder})
endforeach()
