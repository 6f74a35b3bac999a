// The Python module visattn_kernels._cuda: importing it registers the operators of the CUDA kernels; built() says what
// they were compiled for. It is a library of its own since it needs libtorch_cuda.so, which the CPU engine does not.
#include <Python.h>

namespace {

PyObject* built(PyObject*, PyObject*) { return Py_BuildValue("(ss)", VISATTN_GENCODE, VISATTN_WIDTHS); }

PyMethodDef methods[] = {{"built", built, METH_NOARGS, "What nvcc was told of architectures, and the D/Dv compiled."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
